"""One layer's experts for a whole batch: group, call, add.

`compute` never raises for what a sandbox or the network does: a call that fails is made again at
the function's other addresses, and is computed here, from the store, if none answers.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import torch
from torch import Tensor

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionTable
from faasmoe_expert.wire import Mode, rows_per_frame
from faasmoe_router.dispatch.batch import WIRE_DTYPES, LayerBatch
from faasmoe_router.dispatch.errors import CallError
from faasmoe_router.dispatch.fanout import Call, Fanout, Timeouts
from faasmoe_router.dispatch.grouping import group_pairs
from faasmoe_router.dispatch.local import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.routing import Routing

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # addresses tried for one call before it is computed here


class Dispatcher:
    """Computes MoE layers through expert functions. Belongs to the engine's thread.

    Args:
        store: the prepared model; what no sandbox answers is computed from it.
        table: where each function is.
        mode: reduced, or unreduced for results that are bit-identical whatever the blocks.
        token: bearer token of the sandboxes.
        timeouts: bounds of a fan-out.
        metrics: counters, on the router's registry.
    """

    def __init__(
        self,
        store: Store,
        table: FunctionTable,
        *,
        mode: Mode = Mode.REDUCED,
        token: str = "",
        timeouts: Timeouts | None = None,
        metrics: DispatchMetrics | None = None,
    ) -> None:
        self._store = store
        self._mode = mode
        self._routing = Routing.from_table(table, store)
        self._fanout = Fanout(token=token, timeouts=timeouts)
        self._local = LocalFunctions(store)
        self._metrics = metrics or DispatchMetrics()
        self._turns: dict[int, int] = defaultdict(int)  # by layer: spreads calls over replicas
        self._retained: Routing | None = None  # whose addresses the connections are for

    def replace_table(self, table: FunctionTable) -> None:
        """Route the next layers by another table; raises TableError and keeps the old one."""
        self._routing = Routing.from_table(table, self._store)

    def close(self) -> None:
        """Close the connections to sandboxes."""
        self._fanout.close()

    def compute(
        self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            layer: index of the MoE layer in the store's manifest.
            hidden: [T, H].
            top_k_index: global expert indices, [T, k]; one out of range is no expert.
            top_k_weight: [T, k].

        Returns:
            [T, H], dtype and device of `hidden`.
        """
        if not len(hidden):
            return torch.zeros_like(hidden)
        with self._metrics.layer_seconds.time():
            routing = self._current_routing().layers[layer]
            rows = hidden.detach().to("cpu").contiguous()  # [T, H]
            top_k = top_k_index.shape[1]
            max_rows = rows_per_frame(
                hidden_size=rows.shape[1],
                dtype=WIRE_DTYPES[rows.dtype],
                mode=self._mode,
                top_k=top_k,
            )
            groups = group_pairs(
                top_k_index.detach().cpu().numpy(),
                top_k_weight.detach().to("cpu", torch.float32).numpy(),
                routing.function_of,
                max_rows=max_rows,
            )
            batch = LayerBatch(rows, groups, layer=layer, mode=self._mode, top_k=top_k)
            self._fill(batch, layer, routing.functions)
            return batch.result().to(hidden.device)

    def _current_routing(self) -> Routing:
        routing = self._routing
        if routing is not self._retained:
            self._fanout.retain(routing.addresses())
            self._retained = routing
        return routing

    def _fill(self, batch: LayerBatch, layer: int, functions: tuple[FunctionEntry, ...]) -> None:
        waiting = list(range(len(batch.groups)))
        turn = self._turns[layer]
        self._turns[layer] += 1
        for attempt in range(MAX_ATTEMPTS):
            tried = [
                i for i in waiting if attempt < len(functions[batch.groups[i].function].addresses)
            ]
            if not tried:
                break
            entries = [functions[batch.groups[i].function] for i in tried]
            calls = [
                Call(_address(e, turn + attempt), e.spec.id, batch.frame(i))
                for i, e in zip(tried, entries, strict=True)
            ]
            failed = self._call(batch, tried, calls)
            waiting = [i for i in waiting if i not in tried or i in failed]
        for i in waiting:
            self._metrics.local.inc()
            batch.compute(i, self._local, functions[batch.groups[i].function].spec)

    def _call(self, batch: LayerBatch, positions: list[int], calls: list[Call]) -> set[int]:
        """Make the calls for these positions of the batch; return the positions that failed."""

        def take(n: int, frame: memoryview) -> None:
            batch.take(positions[n], frame)
            self._metrics.received_bytes.inc(len(frame))

        errors: dict[int, CallError] = self._fanout.run(calls, take)
        self._metrics.calls.inc(len(calls))
        self._metrics.sent_bytes.inc(sum(call.size_bytes for call in calls))
        for n, error in errors.items():
            self._metrics.failed_calls.inc()
            log.warning("a call to %s failed: %s", calls[n].address, error)
        return {positions[n] for n in errors}


def _address(entry: FunctionEntry, turn: int) -> str:
    return entry.addresses[turn % len(entry.addresses)]
