"""Entry point of dispatch: computes one MoE layer for a whole batch through expert functions.

An ordinary layer of a model on the host is begun and finished natively (native_dispatch.py). For
every other, `Dispatcher.compute` brings the inputs to the host, in the store's dtype, which
functions compute in, groups token-expert pairs by function and has the groups executed
(layer_executor.py). It never raises for faults of a sandbox or the network: what no function
answers is computed locally from the store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import TlsPeer
from faasmoe_contracts.wire import OutputMode, max_rows_per_frame
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.dispatch.cold_start import LOST_S, ActivationSettings
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.device_transfer import BufferedTransfer
from faasmoe_router.dispatch.endpoint_health import ResilienceSettings
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout, OverlappedWork
from faasmoe_router.dispatch.layer_batch import WIRE_DTYPES, LayerBatch, group_pairs
from faasmoe_router.dispatch.layer_executor import LayerExecutor
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.native_dispatch import NativeDispatch
from faasmoe_router.dispatch.overflow import OverflowFunctions
from faasmoe_router.dispatch.routing import RoutingIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SentLayer:
    """A layer between `Dispatcher.send` and `Dispatcher.receive`.

    Attributes:
        layer: index of the MoE layer.
        hidden: hidden states, [T, H].
        top_k_index: global expert indices, [T, k].
        top_k_weight: routing weights, [T, k].
        is_in_flight: whether its calls are under way; otherwise `receive` makes them.
    """

    layer: int
    hidden: Tensor
    top_k_index: Tensor
    top_k_weight: Tensor
    is_in_flight: bool


class Dispatcher:
    """Computes MoE layers through expert functions.

    Belongs to the engine's thread, except for `replace_table` and `update_addresses`, which one
    other thread may call at any time, and for the methods documented as safe from any thread.

    Args:
        store: the prepared model; local fallback computes from it.
        table: addresses of the functions; None until the first table is known.
        mode: reduced, or unreduced for results that are bit-identical for any block size.
        token: bearer token of the sandboxes.
        timeouts: bounds of a layer's calls.
        metrics: the dispatcher's metrics, on the router's registry.
        activation: how calls wait for functions that are being activated; None if they never do.
        resilience: how failed and slow calls are handled.
        socket_dir: folder of the Unix sockets of sandboxes on this machine; None for TCP only.
        device_transfer: moves data between the model's device and the host; None for a model on the
            host.
        placement: "auto" colocates hot functions of this machine in this process where that is
            faster, "functions" colocates none. Applies to reduced mode with a model on the host.
        mailbox: whether sandboxes of this machine are called over mailboxes where possible. Applies
            as `placement` does, and where the kernel library is present.
        computes_overflow: whether functions without an address are computed in this process at
            once, because memory is limited, rather than waited for.
        tls: how sandboxes are known that are called over TCP; None calls them without TLS.

    Attributes:
        native: the native path of layers; None if there is none.
    """

    def __init__(
        self,
        store: Store,
        table: RoutingTable | None,
        *,
        mode: OutputMode = OutputMode.REDUCED,
        token: str = "",
        timeouts: DispatchTimeouts | None = None,
        metrics: DispatchMetrics | None = None,
        activation: ActivationSettings | None = None,
        resilience: ResilienceSettings | None = None,
        socket_dir: Path | None = None,
        device_transfer: BufferedTransfer | None = None,
        placement: Literal["auto", "functions"] = "functions",
        mailbox: bool = True,
        computes_overflow: bool = False,
        tls: TlsPeer | None = None,
    ) -> None:
        self._store = store
        self._store_dtype: torch.dtype = getattr(torch, store.manifest.model.dtype)
        self._device_transfer = device_transfer
        self._mode = mode
        self._fanout = Fanout(token=token, timeouts=timeouts, socket_dir=socket_dir, tls=tls)
        self._metrics = metrics or DispatchMetrics()
        if table is None:
            routing = RoutingIndex.empty(store)
        else:
            routing = RoutingIndex.from_table(table, store)
        colocated = None
        if placement == "auto" and socket_dir is not None and device_transfer is None:
            # Not in unreduced mode: bits depend on the thread count, which functions fix.
            # What the overflow computes at once is kept for no replacement.
            is_replaced = activation is not None and not computes_overflow
            colocated = (
                ColocatedFunctions(store, socket_dir, keep_lost_s=LOST_S if is_replaced else 0.0)
                if mode is OutputMode.REDUCED
                else None
            )
        overflow = OverflowFunctions(store) if computes_overflow else None
        self._executor = LayerExecutor(
            store,
            routing,
            fanout=self._fanout,
            metrics=self._metrics,
            activation=activation,
            timeouts=timeouts,
            resilience=resilience,
            colocated=colocated,
            overflow=overflow,
            tls=tls,
        )
        self.native: NativeDispatch | None = None
        is_reduced_on_host = mode is OutputMode.REDUCED and device_transfer is None
        if mailbox and socket_dir is not None and is_reduced_on_host:
            self.native = self._create_native(
                colocated,
                overflow,
                socket_dir,
                token=token,
                timeouts=timeouts or DispatchTimeouts(),
            )

    def _create_native(
        self,
        colocated: ColocatedFunctions | None,
        overflow: OverflowFunctions | None,
        socket_dir: Path,
        *,
        token: str,
        timeouts: DispatchTimeouts,
    ) -> NativeDispatch | None:
        try:
            library = load()
        except KernelsUnavailable as error:
            logger.info("Sandboxes of this machine are called over HTTP only: %s", error)
            return None
        native = NativeDispatch(
            self._store,
            library,
            self.routing,
            health=self._executor.health,
            metrics=self._metrics,
            absences=self._executor.absences,
            colocated=colocated,
            overflow=overflow,
            taken_over=self._executor.taken_over,
            load=self.load,
            socket_dir=socket_dir,
            token=token,
            call_timeout_s=timeouts.call_timeout_s,
        )
        self.load.include_native(native.totals)
        return native

    def start_pass(self, n_rows: int) -> None:
        """Start a forward pass of `n_rows` rows; `compute` does so with its first layer.

        For programs that compute layers through `native.program`.
        """
        self._executor.start_pass(n_rows)
        if self.native is not None:
            self.native.start_pass()

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: OverlappedWork | None = None,
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            layer: index of the MoE layer in the store's manifest.
            hidden: hidden states, [T, H], in the router's dtype.
            top_k_index: global expert indices, [T, k]; out-of-range indices are skipped.
            top_k_weight: routing weights, [T, k].
            while_waiting: work to do once while the calls are in flight.

        Returns:
            [T, H], dtype and device of `hidden`.

        Raises:
            StoreUnreadable: local fallback is needed, and the store lacks the function.
            StoreCorrupted: local fallback is needed, and the function's bytes fail verification.
        """
        sent = self.send(layer, hidden, top_k_index, top_k_weight)
        return self.receive(sent, while_waiting=while_waiting)

    def send(
        self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor
    ) -> SentLayer:
        """Send the calls of an ordinary layer; `receive` makes those of every other.

        For engines that do other work between the two; arguments as for `compute`.
        """
        if not len(hidden):
            return SentLayer(layer, hidden, top_k_index, top_k_weight, False)
        if layer == 0:
            self.start_pass(len(hidden))
        return self._begin(layer, hidden, top_k_index, top_k_weight)

    def _begin(
        self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor
    ) -> SentLayer:
        if self.native is None or hidden.dtype not in WIRE_DTYPES:
            return SentLayer(layer, hidden, top_k_index, top_k_weight, False)
        rows = hidden.detach().contiguous()  # [T, H]
        index = top_k_index.detach().to(torch.int64).contiguous()  # [T, k]
        weight = top_k_weight.detach().to(torch.float32).contiguous()  # [T, k]
        is_in_flight = self.native.begin(layer, rows, index, weight)
        return SentLayer(layer, rows, index, weight, is_in_flight)

    def receive(self, sent: SentLayer, *, while_waiting: OverlappedWork | None = None) -> Tensor:
        """Return the output of a layer that was sent; see `compute`."""
        if not len(sent.hidden):
            if while_waiting is not None:
                while_waiting()
            return torch.zeros_like(sent.hidden)
        if (output := self._finish(sent, while_waiting)) is not None:
            return output
        return self.compute_general(
            sent.layer,
            sent.hidden,
            sent.top_k_index,
            sent.top_k_weight,
            while_waiting=None if sent.is_in_flight else while_waiting,
        )

    def _finish(self, sent: SentLayer, while_waiting: OverlappedWork | None) -> Tensor | None:
        """Return the output of a layer that is in flight; None for the general path."""
        if not sent.is_in_flight:
            return None
        assert self.native is not None
        output = torch.empty_like(sent.hidden)  # [T, H]
        return output if self.native.finish(sent.layer, output, while_waiting) else None

    def compute_general(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: OverlappedWork | None = None,
    ) -> Tensor:
        """Return the same as `compute`, for a layer of a pass that was not computed natively.

        Over the general path, unless what made it necessary is over: a sandbox that was lost, or
        routes that have changed since the pass began.
        """
        self._executor.apply_routing()
        if self.native is not None:
            self.native.settle_before(layer)
            if self.native.refresh(layer):
                sent = self._begin(layer, hidden, top_k_index, top_k_weight)
                if (output := self._finish(sent, while_waiting)) is not None:
                    return output
                while_waiting = None if sent.is_in_flight else while_waiting
                self.native.settle_before(layer)
        with self._metrics.layer_seconds.time():
            output = self._compute_generally(
                layer, hidden, top_k_index, top_k_weight, while_waiting
            )
        if self.native is not None:
            self.native.refresh(layer + 1)
        return output

    def _compute_generally(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        while_waiting: OverlappedWork | None,
    ) -> Tensor:
        rows = hidden.detach().to(self._store_dtype)  # [T, H]
        if self._device_transfer is None:
            return self._compute_on_host(
                layer,
                rows.contiguous(),
                top_k_index.detach().numpy(),
                top_k_weight.detach().float().numpy(),
                while_waiting,
                output_dtype=hidden.dtype,
            )
        host_inputs = self._device_transfer.to_host(
            rows, top_k_index, top_k_weight, while_waiting=while_waiting or _no_work
        )
        return self._compute_on_host(
            layer,
            host_inputs.rows,
            host_inputs.top_k_index,
            host_inputs.top_k_weight,
            None,
            output_dtype=hidden.dtype,
        )

    def _compute_on_host(
        self,
        layer: int,
        rows: Tensor,
        top_k_index: NDArray[np.int64],
        top_k_weight: NDArray[np.float32],
        while_waiting: OverlappedWork | None,
        *,
        output_dtype: torch.dtype,
    ) -> Tensor:
        """Return the weighted sum on the model's device, [T, H] in `output_dtype`.

        `rows` [T, H] are contiguous host memory, in the store's dtype.
        """
        routing = self.routing.layers[layer]
        top_k = top_k_index.shape[1]
        max_rows = max_rows_per_frame(
            hidden_size=rows.shape[1],
            dtype=WIRE_DTYPES[rows.dtype],
            mode=self._mode,
            top_k=top_k,
        )
        groups = group_pairs(top_k_index, top_k_weight, routing.function_of, max_rows=max_rows)
        batch = LayerBatch(
            rows,
            groups,
            layer=layer,
            mode=self._mode,
            top_k=top_k,
            output_dtype=output_dtype,
            transfer=self._device_transfer,
        )
        self._executor.execute(batch, layer, routing.functions, while_waiting=while_waiting)
        return batch.result()

    @property
    def routing(self) -> RoutingIndex:
        """The current routing; safe from any thread."""
        return self._executor.routing

    @property
    def load(self) -> LoadMeter:
        """How much each function is called; safe to read from any thread."""
        return self._executor.load

    def replace_table(self, table: RoutingTable) -> None:
        """Route the next layers by another table.

        Raises:
            RoutingTableError: the table does not fit the store; the old one stays in use.
        """
        self._set_routing(RoutingIndex.from_table(table, self._store))

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Replace the addresses of some functions.

        Raises:
            RoutingTableError: a function is not in the table; nothing changes.
        """
        self._set_routing(self.routing.with_addresses(version, addresses))

    def _set_routing(self, routing: RoutingIndex) -> None:
        self._executor.set_routing(routing)
        if self.native is not None:
            self.native.set_routing(routing)
            self.native.release_unmapped()

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed locally, by reading all of their bytes.

        Safe from any thread.

        Raises:
            StoreUnreadable: the store no longer has one of them.
            StoreCorrupted: the bytes of one fail verification.
        """
        for spec in specs:
            map_function(spec, self._store)

    def show_calls_late(self, read_tokens: Callable[[], float], *, min_tokens: int) -> None:
        """Show calls in metrics by windows of tokens; see `WindowedCollector.show_late`."""
        self._metrics.windows.show_late(read_tokens, min_tokens=min_tokens)

    def release_memory(self) -> None:
        """Free memory that is kept for the next calls, when idle; safe from any thread."""
        self._fanout.release_memory()
        self._executor.release_memory()
        if self.native is not None:
            self.native.release_unmapped()
            self.native.release_memory()

    def close(self) -> None:
        """Stop background threads and close the connections to sandboxes."""
        if self.native is not None:
            self.native.close()
        self._executor.close()
        self._fanout.close()


def _no_work() -> None:
    """Do nothing while inputs are copied."""
