"""Hot functions: computed in the router's own process where that was measured to take less time.

Only functions of this machine, whose sandboxes map the same pages of the store: nothing is in
memory twice, and a function that goes to zero is let go here, too. Sandboxes keep them, and the
load that the autoscaler sees stays what it is: what is computed here can be called at any time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.same_node import LOOPBACK, socket_path
from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionSpec
from faasmoe_expert.wire import Request
from faasmoe_router.dispatch.grouping import Group
from faasmoe_router.dispatch.local import compute_function, map_function
from faasmoe_router.dispatch.placement import Placement, Popularity
from faasmoe_router.dispatch.routing import Routing
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)


class HotFunctions:
    """Belongs to the engine's thread, but for `let_go`; functions are mapped in another one.

    Args:
        store: where they are mapped from.
        socket_dir: where sandboxes of this machine have Unix sockets.
    """

    def __init__(self, store: Store, socket_dir: Path) -> None:
        self._store = store
        self._socket_dir = socket_dir
        self._routing: Routing | None = None
        self._cut: tuple[tuple[FunctionSpec, ...], ...] = ()
        self._near: list[frozenset[int]] = []  # by layer: positions of functions of this machine
        self._mapped: dict[FunctionSpec, ExpertFunction] = {}
        self._ready: Mapping[FunctionSpec, ExpertFunction] = {}  # of the layer that is computed
        self._wanted: frozenset[FunctionSpec] = frozenset()
        self._refused: set[FunctionSpec] = set()  # whose bytes were found wrong here
        self._lock = threading.Lock()  # of what is mapped and wanted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hot")
        self._n_rows = 0
        self._took_s = 0.0
        self._is_clean = False

    def begin_pass(self, routing: Routing, n_rows: int) -> None:
        """Begin a pass through the layers, by this routing."""
        if routing is not self._routing:
            self._take(routing)
        self._n_rows, self._took_s, self._is_clean = n_rows, 0.0, True

    def here(
        self, layer: int, groups: Sequence[Group], functions: Sequence[FunctionEntry]
    ) -> Collection[int]:
        """Return the positions in `groups` that are to be computed here."""
        if layer >= len(self._near) or len(functions) != len(self._cut[layer]):
            return ()
        for group in groups:
            self._popularity.add(layer, group.function, len(group.pair_row))
        n = self._placement.here(self._n_rows)
        hot = self._popularity.hottest(layer, n, self._near[layer])
        specs = [functions[i].spec for i in hot]
        self._ready = {s: f for s in specs if (f := self._mapped.get(s)) is not None}
        self._is_clean = self._is_clean and len(self._ready) == n
        return [i for i, g in enumerate(groups) if functions[g.function].spec in self._ready]

    def end_layer(self, layer: int, took_s: float, *, is_clean: bool) -> None:
        """Take the time of a layer; what failed or was waited for says nothing of placement."""
        self._ready = {}  # which would keep in memory what is let go
        self._took_s += took_s
        self._is_clean = self._is_clean and is_clean
        if layer + 1 < len(self._near) or not self._near:
            return
        if self._is_clean:
            self._placement.add(self._n_rows, self._took_s)
        if self._popularity.end_pass():
            self._want_hottest()
        self._is_clean = False

    def compute(self, spec: FunctionSpec, request: Request) -> Tensor:
        """Return what a function of `here` answers; raises StoreCorrupted, and lets go of it."""
        try:
            return compute_function(self._ready[spec], request)
        except StoreCorrupted as error:
            logger.warning("it stays with its sandboxes: %s", error)
            self._refused.add(spec)
            self._want(self._wanted - {spec})
            raise

    def let_go(self, routing: Routing) -> None:
        """Let go of functions that no sandbox has any more; from any thread, also when idle."""
        gone = {entry.spec for entry in routing.entries.values() if not entry.addresses}
        with self._lock:
            self._wanted -= gone
            for spec in gone:
                self._mapped.pop(spec, None)

    def close(self) -> None:
        """End what runs beside the engine's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, routing: Routing) -> None:
        cut = tuple(tuple(f.spec for f in layer.functions) for layer in routing.layers)
        if cut != self._cut:  # another model's table, or the first
            self._cut = cut
            self._placement = Placement(max(map(len, cut), default=0))
            n_hot = self._placement.choices[-1]
            self._popularity = Popularity([len(layer) for layer in cut], n_hot)
            self._refused = set()
        self._routing = routing
        is_near = self._nearness(routing.addresses())
        self._near = [
            frozenset(
                i for i, f in enumerate(layer.functions) if any(map(is_near.get, f.addresses))
            )
            for layer in routing.layers
        ]
        self._want_hottest()

    def _nearness(self, addresses: Collection[str]) -> Mapping[str, bool]:
        """Tell of each address whether its sandbox is one of this machine."""
        found = {}
        for address in addresses:
            host, _, port = address.rpartition(":")
            is_local = host in LOOPBACK and port.isdecimal()
            found[address] = is_local and socket_path(self._socket_dir, int(port)).exists()
        return found

    def _want_hottest(self) -> None:
        most = self._placement.choices[-1]
        self._want(
            frozenset(
                specs[i]
                for layer, specs in enumerate(self._cut)
                for i in self._popularity.hottest(layer, most, self._near[layer])
            )
            - self._refused
        )

    def _want(self, specs: frozenset[FunctionSpec]) -> None:
        """Have these functions and no others; those that are new come in time."""
        with self._lock:
            new, self._wanted = specs - self._wanted, specs
            for spec in self._mapped.keys() - specs:
                self._mapped.pop(spec, None)
        for spec in new:
            self._thread.submit(self._map, spec)

    def _map(self, spec: FunctionSpec) -> None:
        if spec not in self._wanted or spec in self._mapped:
            return
        try:
            function = map_function(spec, self._store)
        except (StoreCorrupted, StoreUnreadable) as error:
            logger.info("function %s stays with its sandboxes: %s", spec.id, error)
            return
        with self._lock:
            if spec in self._wanted:  # still
                self._mapped[spec] = function
