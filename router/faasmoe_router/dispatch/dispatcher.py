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

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec, FunctionTable
from faasmoe_expert.wire import Mode, rows_per_frame
from faasmoe_router.dispatch.batch import WIRE_DTYPES, LayerBatch
from faasmoe_router.dispatch.calls import Timeouts
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.filling import Filler, Meanwhile
from faasmoe_router.dispatch.grouping import group_pairs
from faasmoe_router.dispatch.holding import Holding
from faasmoe_router.dispatch.hot import HotFunctions
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import Resilience
from faasmoe_router.dispatch.routing import Routing
from faasmoe_router.dispatch.staging import HostStage


class Dispatcher:
    """Computes MoE layers through expert functions.

    Belongs to the engine's thread, but for `replace_table` and `move_functions`, which one other
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
        table: FunctionTable | None,
        *,
        mode: Mode = Mode.REDUCED,
        token: str = "",
        timeouts: Timeouts | None = None,
        metrics: DispatchMetrics | None = None,
        holding: Holding | None = None,
        resilience: Resilience | None = None,
        socket_dir: Path | None = None,
        stage: HostStage | None = None,
        placement: Literal["auto", "functions"] = "functions",
    ) -> None:
        self._store = store
        self._stage = stage
        self._mode = mode
        self._fanout = Fanout(token=token, timeouts=timeouts, socket_dir=socket_dir)
        self._metrics = metrics or DispatchMetrics()
        if table is None:
            routing = Routing.before_any_table(store)
        else:
            routing = Routing.from_table(table, store)
        hot = None
        if placement == "auto" and socket_dir is not None and stage is None:
            # Bits that must not depend on where a block is depend on threads: functions' alone.
            hot = HotFunctions(store, socket_dir) if mode is Mode.REDUCED else None
        self._filler = Filler(
            store,
            routing,
            fanout=self._fanout,
            metrics=self._metrics,
            holding=holding,
            timeouts=timeouts,
            resilience=resilience,
            hot=hot,
        )

    @property
    def routing(self) -> Routing:
        """Where each function is now."""
        return self._filler.routing

    @property
    def load(self) -> LoadMeter:
        """How much each function is called."""
        return self._filler.load

    def replace_table(self, table: FunctionTable) -> None:
        """Route the next layers by another table; raises TableError and keeps the old one."""
        self._filler.take_routing(Routing.from_table(table, self._store))

    def move_functions(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Give some functions other addresses; raises TableError and changes nothing."""
        self._filler.take_routing(self.routing.moved(version, addresses))

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed here: reads all of their bytes; from any thread.

        Raises:
            StoreUnreadable: the store does not have one of them any more.
            StoreCorrupted: it has wrong bytes of one.
        """
        for spec in specs:
            map_function(spec, self._store)

    def rest(self) -> None:
        """Give back memory that is kept for the next calls, as there are none; from any thread."""
        self._fanout.rest()

    def close(self) -> None:
        """Close the connections to sandboxes."""
        self._filler.close()
        self._fanout.close()

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        meanwhile: Meanwhile = lambda: None,
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
            meanwhile()
            return torch.zeros_like(hidden)
        with self._metrics.layer_seconds.time():
            if self._stage is None:
                return self._compute(
                    layer,
                    hidden.detach().contiguous(),
                    top_k_index.detach().numpy(),
                    top_k_weight.detach().float().numpy(),
                    meanwhile,
                )
            landed = self._stage.land(hidden, top_k_index, top_k_weight, meanwhile=meanwhile)
            return self._compute(
                layer, landed.rows, landed.top_k_index, landed.top_k_weight, lambda: None
            )

    def _compute(
        self,
        layer: int,
        rows: Tensor,
        top_k_index: NDArray[np.int64],
        top_k_weight: NDArray[np.float32],
        meanwhile: Meanwhile,
    ) -> Tensor:
        """Return the sum where the model is, [T, H]; `rows` [T, H] are on the host, contiguous."""
        routing = self.routing.layers[layer]
        top_k = top_k_index.shape[1]
        max_rows = rows_per_frame(
            hidden_size=rows.shape[1],
            dtype=WIRE_DTYPES[rows.dtype],
            mode=self._mode,
            top_k=top_k,
        )
        groups = group_pairs(top_k_index, top_k_weight, routing.function_of, max_rows=max_rows)
        batch = LayerBatch(rows, groups, layer=layer, mode=self._mode, top_k=top_k, way=self._stage)
        self._filler.fill(batch, layer, routing.functions, meanwhile=meanwhile)
        return batch.result()
