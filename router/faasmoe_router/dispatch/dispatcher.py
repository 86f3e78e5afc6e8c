"""One layer's experts for a whole batch: group, call, add.

`compute` never raises for what a sandbox or the network does: what no function answers is computed
here, from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode, max_rows_per_frame
from faasmoe_router.dispatch.calls import DispatchTimeouts
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.device_transfer import BufferedTransfer
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.grouping import group_pairs
from faasmoe_router.dispatch.layer_batch import WIRE_DTYPES, LayerBatch
from faasmoe_router.dispatch.layer_executor import LayerExecutor, OverlappedWork
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import ResilienceSettings
from faasmoe_router.dispatch.routing import RoutingIndex


class Dispatcher:
    """Computes MoE layers through expert functions.

    Belongs to the engine's thread, but for `replace_table` and `update_addresses`, which one other
    thread may call at any time, and for what reads.

    Args:
        store: the prepared model; what no sandbox answers is computed from it.
        table: where each function is; None while nobody has told.
        mode: reduced, or unreduced for results that are bit-identical whatever the blocks.
        token: bearer token of the sandboxes.
        timeouts: bounds of a fan-out.
        metrics: counters, on the router's registry.
        holding: how calls wait for functions that are started; None if none ever is.
        resilience: how calls that fail or take long are dealt with.
        socket_dir: where sandboxes of this machine have Unix sockets; None for TCP alone.
        stage: between the model's device and the host; None if the model is on the host.
        placement: "auto" computes hot functions of this machine in this process where that takes
            less time, "functions" none. In reduced mode and on the host alone.
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
    ) -> None:
        self._store = store
        self._device_transfer = device_transfer
        self._mode = mode
        self._fanout = Fanout(token=token, timeouts=timeouts, socket_dir=socket_dir)
        self._metrics = metrics or DispatchMetrics()
        if table is None:
            routing = RoutingIndex.empty(store)
        else:
            routing = RoutingIndex.from_table(table, store)
        colocated = None
        if placement == "auto" and socket_dir is not None and device_transfer is None:
            # Bits that must not depend on where a block is depend on threads: functions' alone.
            colocated = (
                ColocatedFunctions(store, socket_dir) if mode is OutputMode.REDUCED else None
            )
        self._executor = LayerExecutor(
            store,
            routing,
            fanout=self._fanout,
            metrics=self._metrics,
            activation=activation,
            timeouts=timeouts,
            resilience=resilience,
            colocated=colocated,
        )

    @property
    def routing(self) -> RoutingIndex:
        """Where each function is now."""
        return self._executor.routing

    @property
    def load(self) -> LoadMeter:
        """How much each function is called."""
        return self._executor.load

    def replace_table(self, table: RoutingTable) -> None:
        """Route the next layers by another table; raises TableError and keeps the old one."""
        self._executor.set_routing(RoutingIndex.from_table(table, self._store))

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Give some functions other addresses; raises TableError and changes nothing."""
        self._executor.set_routing(self.routing.with_addresses(version, addresses))

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed here: reads all of their bytes; from any thread.

        Raises:
            StoreUnreadable: the store does not have one of them any more.
            StoreCorrupted: it has wrong bytes of one.
        """
        for spec in specs:
            map_function(spec, self._store)

    def release_memory(self) -> None:
        """Give back memory that is kept for the next calls, as there are none; from any thread."""
        self._fanout.release_memory()

    def close(self) -> None:
        """Close the connections to sandboxes."""
        self._executor.close()
        self._fanout.close()

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: OverlappedWork = lambda: None,
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            layer: index of the MoE layer in the store's manifest.
            hidden: [T, H].
            top_k_index: global expert indices, [T, k]; one out of range is no expert.
            top_k_weight: [T, k].
            meanwhile: work to do, once, while the calls are away.

        Returns:
            [T, H], dtype and device of `hidden`.
        """
        if not len(hidden):
            while_waiting()
            return torch.zeros_like(hidden)
        with self._metrics.layer_seconds.time():
            if self._device_transfer is None:
                return self._compute_on_host(
                    layer,
                    hidden.detach().contiguous(),
                    top_k_index.detach().numpy(),
                    top_k_weight.detach().float().numpy(),
                    while_waiting,
                )
            host_inputs = self._device_transfer.to_host(
                hidden, top_k_index, top_k_weight, while_waiting=while_waiting
            )
            return self._compute_on_host(
                layer,
                host_inputs.rows,
                host_inputs.top_k_index,
                host_inputs.top_k_weight,
                lambda: None,
            )

    def _compute_on_host(
        self,
        layer: int,
        rows: Tensor,
        top_k_index: NDArray[np.int64],
        top_k_weight: NDArray[np.float32],
        while_waiting: OverlappedWork,
    ) -> Tensor:
        """Return the sum where the model is, [T, H]; `rows` [T, H] are on the host, contiguous."""
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
            rows, groups, layer=layer, mode=self._mode, top_k=top_k, transfer=self._device_transfer
        )
        self._executor.execute(batch, layer, routing.functions, while_waiting=while_waiting)
        return batch.result()
