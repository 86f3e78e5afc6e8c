"""How many of a layer's functions the router computes itself, and which. Pure: times are told.

A call to a function costs both sides a turn on some core: about a millisecond of processor time
beside products that stream weights, by measurement. What the router computes itself saves that, and
takes a core away from what else it does. Which is more depends on cores, model and batch, so it is
measured where it happens: duels of two passes through
the layers, one with all functions called and one with some computed here, right after each other
(docs/performance.md, "hot blocks").

The router never becomes the whole model: at most half of a layer's functions are computed in it.

Hot functions: computed in the router's own process where that was measured to take less time.

Only functions of this machine, whose sandboxes map the same pages of the store: nothing is in
memory twice, and a function that goes to zero is let go here, too. Sandboxes keep them, and the
load that the autoscaler sees stays what it is: what is computed here can be called at any time.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import LOOPBACK_HOSTS, unix_socket_path
from faasmoe_contracts.wire import ExpertRequest
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.dispatch.grouping import Group
from faasmoe_router.dispatch.local_functions import compute_function, map_function
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)


MAX_COLOCATED_ROWS = 64
"""Rows of a batch above which nothing is computed here: products of many rows take all cores."""

MAX_COLOCATED_FUNCTIONS = 4
MIN_TRIALS = 5
"""Duels that are fought before anything is believed."""

MAX_KEPT_TRIALS = 9
PASSES_BETWEEN_TRIALS = 64
MIN_GAIN = 0.02
"""What computing some here must save of the time of calling all, and of what is done now."""

DECAY = 0.99
PASSES_BETWEEN_RANKINGS = 64
MIN_LEAD = 1.25
"""Times what a hot function has that another one must have to take its place."""


def colocation_choices(n_functions: int) -> tuple[int, ...]:
    """Return how many of a layer's functions may be computed here, none among them, ascending."""
    half = min(n_functions // 2, MAX_COLOCATED_FUNCTIONS)
    return (0, *(n for n in (1, 2, 4) if n <= half))


class PairedTrials:
    """Which of some choices takes least time, by duels of each with the first.

    Args:
        n_choices: how many there are; the first is what the others are compared with.
    """

    def __init__(self, n_choices: int) -> None:
        self._ratios = [deque[float](maxlen=MAX_KEPT_TRIALS) for _ in range(n_choices)]
        self._best = 0
        self._n_passes = 0
        self._candidate = 0  # none
        self._baseline_s: float | None = None  # the first's time in the duel that is being fought
        self._rotation = 0

    @property
    def choice(self) -> int:
        """What the next pass is to do; the same until `add`."""
        if not self._candidate:
            return self._best
        return 0 if self._baseline_s is None else self._candidate

    def record_pass(self, elapsed_s: float) -> None:
        """Take the time of a pass that did `choice`."""
        if not self._candidate:
            self._n_passes += 1
            self._candidate = self._next_candidate()
        elif self._baseline_s is None:
            self._baseline_s = elapsed_s
        else:
            self._ratios[self._candidate].append(elapsed_s / self._baseline_s)
            self._candidate, self._baseline_s, self._n_passes = 0, None, 0
            self._best = self._find_best()
            self._candidate = self._next_candidate()

    def _next_candidate(self) -> int:
        candidates = range(1, len(self._ratios))
        undersampled = [i for i in candidates if len(self._ratios[i]) < MIN_TRIALS]
        if undersampled:
            return min(undersampled, key=lambda i: len(self._ratios[i]))
        if not candidates or self._n_passes < PASSES_BETWEEN_TRIALS:
            return 0
        self._rotation = self._rotation % len(candidates) + 1
        return self._rotation

    def _find_best(self) -> int:
        ratios = [1.0, *(self._median_ratio(i) for i in range(1, len(self._ratios)))]
        fastest = min(range(len(ratios)), key=ratios.__getitem__)
        return fastest if ratios[fastest] < ratios[self._best] - MIN_GAIN else self._best

    def _median_ratio(self, choice: int) -> float:
        ratios = self._ratios[choice]
        return statistics.median(ratios) if len(ratios) >= MIN_TRIALS else float("inf")


class ColocationPolicy:
    """How many of each layer's functions are computed here, by the batch's size.

    Args:
        n_functions: functions of the layer that has most.
    """

    def __init__(self, n_functions: int) -> None:
        self.choices = colocation_choices(n_functions)
        self._trials: dict[int, PairedTrials] = {}

    def n_colocated(self, n_rows: int) -> int:
        """Return how many of each layer's functions a pass of so many rows computes here."""
        return self.choices[self._trials_for(n_rows).choice] if n_rows <= MAX_COLOCATED_ROWS else 0

    def record_pass(self, n_rows: int, elapsed_s: float) -> None:
        """Take the time that the layers of such a pass took, all of them."""
        if n_rows <= MAX_COLOCATED_ROWS:
            self._trials_for(n_rows).record_pass(elapsed_s)

    def _trials_for(self, n_rows: int) -> PairedTrials:
        return self._trials.setdefault(n_rows.bit_length(), PairedTrials(len(self.choices)))


class FunctionRanking:
    """Which functions of each layer have most to compute, lately.

    Args:
        n_functions: of each layer.
        n_hot: how many of each layer's are hot.
    """

    def __init__(self, n_functions: Sequence[int], n_hot: int) -> None:
        self._n_hot = n_hot
        self._pairs: list[NDArray[np.float64]] = [np.zeros(n) for n in n_functions]
        self._ranked: list[tuple[int, ...]] = [tuple(range(n)) for n in n_functions]
        self._n_passes = 0

    def record_pairs(self, layer: int, function_index: int, n_pairs: int) -> None:
        """Count what a function of a layer, by its position, is asked for."""
        self._pairs[layer][function_index] += n_pairs

    def finish_pass(self) -> bool:
        """Let what was counted fade; now and then rank anew, and tell so."""
        self._n_passes += 1
        if self._n_passes % PASSES_BETWEEN_RANKINGS != 1:
            return False
        for layer, pairs in enumerate(self._pairs):
            lead = np.ones(len(pairs))
            lead[list(self._ranked[layer][: self._n_hot])] = MIN_LEAD
            self._ranked[layer] = tuple(int(i) for i in np.argsort(-pairs * lead, kind="stable"))
            pairs *= DECAY**PASSES_BETWEEN_RANKINGS
        return True

    def hottest(self, layer: int, n: int, candidates: Collection[int]) -> tuple[int, ...]:
        """Return the positions of a layer's functions that have most, of some, at most n."""
        return tuple(i for i in self._ranked[layer] if i in candidates)[:n]


class ColocatedFunctions:
    """Belongs to the engine's thread, but for `let_go`; functions are mapped in another one.

    Args:
        store: where they are mapped from.
        socket_dir: where sandboxes of this machine have Unix sockets.
    """

    def __init__(self, store: Store, socket_dir: Path) -> None:
        self._store = store
        self._socket_dir = socket_dir
        self._routing: RoutingIndex | None = None
        self._specs_by_layer: tuple[tuple[FunctionSpec, ...], ...] = ()
        self._same_node: list[
            frozenset[int]
        ] = []  # by layer: positions of functions of this machine
        self._mapped: dict[FunctionSpec, ExpertFunction] = {}
        self._layer_functions: Mapping[
            FunctionSpec, ExpertFunction
        ] = {}  # of the layer that is computed
        self._wanted: frozenset[FunctionSpec] = frozenset()
        self._corrupted: set[FunctionSpec] = set()  # whose bytes were found wrong here
        self._lock = threading.Lock()  # of what is mapped and wanted
        self._mapping_executor = ThreadPoolExecutor(1, thread_name_prefix="colocation")
        self._n_rows = 0
        self._elapsed_s = 0.0
        self._is_valid_sample = False

    def start_pass(self, routing: RoutingIndex, n_rows: int) -> None:
        """Begin a pass through the layers, by this routing."""
        if routing is not self._routing:
            self._apply_routing(routing)
        self._n_rows, self._elapsed_s, self._is_valid_sample = n_rows, 0.0, True

    def select_positions(
        self, layer: int, groups: Sequence[Group], functions: Sequence[FunctionEndpoints]
    ) -> Collection[int]:
        """Return the positions in `groups` that are to be computed here."""
        if layer >= len(self._same_node) or len(functions) != len(self._specs_by_layer[layer]):
            return ()
        for group in groups:
            self._ranking.record_pairs(layer, group.function_index, len(group.pair_row))
        n_colocated = self._policy.n_colocated(self._n_rows)
        hot = self._ranking.hottest(layer, n_colocated, self._same_node[layer])
        specs = [functions[i].spec for i in hot]
        self._layer_functions = {s: f for s in specs if (f := self._mapped.get(s)) is not None}
        self._is_valid_sample = self._is_valid_sample and len(self._layer_functions) == n_colocated
        return [
            i
            for i, g in enumerate(groups)
            if functions[g.function_index].spec in self._layer_functions
        ]

    def finish_layer(self, layer: int, elapsed_s: float, *, is_valid_sample: bool) -> None:
        """Take the time of a layer; what failed or was waited for says nothing of placement."""
        self._layer_functions = {}  # which would keep in memory what is let go
        self._elapsed_s += elapsed_s
        self._is_valid_sample = self._is_valid_sample and is_valid_sample
        if layer + 1 < len(self._same_node) or not self._same_node:
            return
        if self._is_valid_sample:
            self._policy.record_pass(self._n_rows, self._elapsed_s)
        if self._ranking.finish_pass():
            self._select_hottest()
        self._is_valid_sample = False

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return what a function of `here` answers; raises StoreCorrupted, and lets go of it."""
        try:
            return compute_function(self._layer_functions[spec], request)
        except StoreCorrupted as error:
            logger.warning("A function is no longer colocated: %s", error)
            self._corrupted.add(spec)
            self._set_wanted(self._wanted - {spec})
            raise

    def release_unassigned(self, routing: RoutingIndex) -> None:
        """Let go of functions that no sandbox has any more; from any thread, also when idle."""
        unassigned = {entry.spec for entry in routing.entries.values() if not entry.addresses}
        with self._lock:
            self._wanted -= unassigned
            for spec in unassigned:
                self._mapped.pop(spec, None)

    def close(self) -> None:
        """End what runs beside the engine's thread."""
        self._mapping_executor.shutdown(wait=False, cancel_futures=True)

    def _apply_routing(self, routing: RoutingIndex) -> None:
        specs_by_layer = tuple(tuple(f.spec for f in layer.functions) for layer in routing.layers)
        if specs_by_layer != self._specs_by_layer:  # another model's table, or the first
            self._specs_by_layer = specs_by_layer
            self._policy = ColocationPolicy(max(map(len, specs_by_layer), default=0))
            n_hot = self._policy.choices[-1]
            self._ranking = FunctionRanking([len(layer) for layer in specs_by_layer], n_hot)
            self._corrupted = set()
        self._routing = routing
        is_same_node = self._find_same_node(routing.addresses())
        self._same_node = [
            frozenset(
                i for i, f in enumerate(layer.functions) if any(map(is_same_node.get, f.addresses))
            )
            for layer in routing.layers
        ]
        self._select_hottest()

    def _find_same_node(self, addresses: Collection[str]) -> Mapping[str, bool]:
        """Tell of each address whether its sandbox is one of this machine."""
        is_same_node = {}
        for address in addresses:
            host, _, port = address.rpartition(":")
            is_loopback = host in LOOPBACK_HOSTS and port.isdecimal()
            is_same_node[address] = (
                is_loopback and unix_socket_path(self._socket_dir, int(port)).exists()
            )
        return is_same_node

    def _select_hottest(self) -> None:
        max_functions = self._policy.choices[-1]
        self._set_wanted(
            frozenset(
                specs[i]
                for layer, specs in enumerate(self._specs_by_layer)
                for i in self._ranking.hottest(layer, max_functions, self._same_node[layer])
            )
            - self._corrupted
        )

    def _set_wanted(self, specs: frozenset[FunctionSpec]) -> None:
        """Have these functions and no others; those that are new come in time."""
        with self._lock:
            new, self._wanted = specs - self._wanted, specs
            for spec in self._mapped.keys() - specs:
                self._mapped.pop(spec, None)
        for spec in new:
            self._mapping_executor.submit(self._map_wanted, spec)

    def _map_wanted(self, spec: FunctionSpec) -> None:
        if spec not in self._wanted or spec in self._mapped:
            return
        try:
            function = map_function(spec, self._store)
        except (StoreCorrupted, StoreUnreadable) as error:
            logger.info("Function %s cannot be colocated: %s", spec.id, error)
            return
        with self._lock:
            if spec in self._wanted:  # still
                self._mapped[spec] = function
