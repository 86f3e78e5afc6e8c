"""Colocation: computes hot functions of this machine in the router's process if that is faster.

A call to a function costs
both sides a scheduling turn, about a millisecond of processor time next to matrix products that
stream weights, by measurement. Computing a function in the router saves that, but takes a core from
its other work. Which effect wins depends on cores, model and batch, so it is measured in operation:
paired trials of two consecutive forward passes, one that calls all functions and one that computes
some in the router (docs/performance-log.md, "hot blocks"). Some are at most half of a layer's
functions, or all of them where the model has few: then a layer waits for no other process, and all
its products share this process's threads.

Only functions whose sandboxes run on this machine qualify. They map the same pages of the store, so
nothing is in memory twice, and a function that scales to zero is released here too. The sandboxes
stay, and the load that the autoscaler sees does not change: any colocated function can be called
again at any time.
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
from faasmoe_router.dispatch.layer_batch import Group
from faasmoe_router.dispatch.local_functions import compute_function, map_function
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)


MAX_COLOCATED_FUNCTIONS = 4
"""Of a layer, if not all of them are."""

MAX_MODEL_FUNCTIONS = 256
"""Of all layers, if all of them are colocated. Each costs objects, address space and page
tables, whether it is computed here or not."""

MAX_COLOCATED_ROWS = 64
"""Larger batches colocate nothing: products of many rows occupy all cores."""

PASSES_BEFORE_MAPPING = 16
"""Forward passes with the same routing, before functions are mapped for it: what maps them takes
time from a first token, and from a model that answers one short request and goes to zero."""

MIN_TRIALS = 5
"""Trials of a choice before its result counts."""

MAX_KEPT_TRIALS = 9
PASSES_BETWEEN_TRIALS = 64
PASSES_BETWEEN_FIRST_TRIALS = 4
"""The same while a choice of another batch size is assumed. Prompts are few passes, so that they
would otherwise be trials for long."""

MIN_GAIN = 0.02
"""Fraction of the baseline's time by which a choice must beat the current one to replace it."""

DECAY = 0.99
PASSES_BETWEEN_RANKINGS = 64
MIN_LEAD = 1.25
"""Factor by which another function must exceed a hot one's pairs to take its place."""


class ColocatedFunctions:
    """The functions that are computed in the router's process.

    Belongs to the engine's thread, except for `release_unassigned`. A background thread maps
    functions from the store.

    Args:
        store: the prepared model.
        socket_dir: folder of the Unix sockets of sandboxes on this machine.
    """

    def __init__(self, store: Store, socket_dir: Path) -> None:
        self._store = store
        self._socket_dir = socket_dir
        self._routing: RoutingIndex | None = None
        self._specs_by_layer: tuple[tuple[FunctionSpec, ...], ...] = ()
        self._same_node: list[frozenset[int]] = []  # by layer: functions with a sandbox here
        self._mapped: dict[FunctionSpec, ExpertFunction] = {}
        self._layer_functions: Mapping[FunctionSpec, ExpertFunction] = {}  # of the current layer
        self._wanted: frozenset[FunctionSpec] = frozenset()
        self._corrupted: set[FunctionSpec] = set()  # failed verification in this process
        self._lock = threading.Lock()  # guards _mapped, _wanted and _selection
        self._mapping_executor = ThreadPoolExecutor(1, thread_name_prefix="colocation")
        self._selection: Mapping[tuple[int, FunctionSpec], ExpertFunction] = {}
        self._selection_state: object = None  # what the selection was made from
        self._n_unmapped = 0  # that it lacks
        self._n_passes = 0  # since the routing changed
        self._n_rows = 0
        self._elapsed_s = 0.0
        self._is_valid_sample = False

    @property
    def mapped(self) -> Collection[FunctionSpec]:
        """Functions that are mapped now; safe from any thread."""
        with self._lock:
            return frozenset(self._mapped)

    @property
    def wanted(self) -> Collection[FunctionSpec]:
        """Functions that are mapped, or will be; safe from any thread."""
        with self._lock:
            return self._wanted

    def start_pass(self, routing: RoutingIndex, n_rows: int) -> None:
        """Start a forward pass with this routing."""
        if routing is not self._routing:
            self._apply_routing(routing)
        self._n_rows, self._elapsed_s, self._is_valid_sample = n_rows, 0.0, True

    def select_positions(
        self, layer: int, groups: Sequence[Group], functions: Sequence[FunctionEndpoints]
    ) -> Collection[int]:
        """Return the positions in `groups` to compute in this process."""
        if layer >= len(self._same_node) or len(functions) != len(self._specs_by_layer[layer]):
            return ()
        for group in groups:
            self._ranking.record_pairs(layer, group.function_index, len(group.pair_row))
        n_colocated = self._policy.n_colocated(self._n_rows)
        hot = self._ranking.hottest(layer, n_colocated, self._same_node[layer])
        specs = [s for i in hot if (s := functions[i].spec) not in self._corrupted]
        self._layer_functions = {s: f for s in specs if (f := self._mapped.get(s)) is not None}
        self._is_valid_sample = self._is_valid_sample and len(self._layer_functions) == len(specs)
        return [
            i
            for i, group in enumerate(groups)
            if functions[group.function_index].spec in self._layer_functions
        ]

    def selection(self) -> Mapping[tuple[int, FunctionSpec], ExpertFunction]:
        """Return what to compute in this process in the pass that has started, by layer.

        The mapping is replaced when the selection changes, and never modified.
        """
        n_colocated = self._policy.n_colocated(self._n_rows)
        with self._lock:
            mapped = dict(self._mapped)
            state = (n_colocated, self._ranking.version, self._same_node, mapped)
            if state != self._selection_state:
                self._selection_state = state
                hottest = [
                    (layer, specs[i])
                    for layer, specs in enumerate(self._specs_by_layer)
                    for i in self._ranking.hottest(layer, n_colocated, self._same_node[layer])
                    if specs[i] not in self._corrupted
                ]
                self._selection = {key: mapped[key[1]] for key in hottest if key[1] in mapped}
                self._n_unmapped = len(hottest) - len(self._selection)
            selection, n_unmapped = self._selection, self._n_unmapped
        self._is_valid_sample = self._is_valid_sample and not n_unmapped
        return selection

    @property
    def ranks_next(self) -> bool:
        """Whether functions are ranked when the pass that has started is finished."""
        return self._ranking.ranks_next

    def record_pairs(self, layer: int, function_index: int, n_pairs: int) -> None:
        """Count pairs of a function of a layer that was computed without `select_positions`."""
        if layer < len(self._specs_by_layer):
            self._ranking.record_pairs(layer, function_index, n_pairs)

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return the output of a selected function: float32 [R, H], or [P, H] unreduced.

        Raises:
            StoreCorrupted: the function's bytes fail verification; it is no longer colocated.
        """
        try:
            return compute_function(self._layer_functions[spec], request)
        except StoreCorrupted as error:
            logger.warning("A function is no longer colocated: %s", error)
            self._corrupted.add(spec)
            self._set_wanted(self._wanted - {spec})
            raise

    def finish_layer(self, layer: int, elapsed_s: float, *, is_valid_sample: bool) -> None:
        """Record a layer's time; one with failures or waits invalidates its pass's sample."""
        self._layer_functions = {}  # would keep released functions in memory
        self._elapsed_s += elapsed_s
        self._is_valid_sample = self._is_valid_sample and is_valid_sample
        if layer + 1 < len(self._same_node) or not self._same_node:
            return
        if self._is_valid_sample:
            self._policy.record_pass(self._n_rows, self._elapsed_s)
        self._n_passes += 1
        is_ranked = self._ranking.finish_pass()
        if self._n_passes == PASSES_BEFORE_MAPPING or (
            is_ranked and self._n_passes > PASSES_BEFORE_MAPPING
        ):
            self._set_wanted(self._find_hottest())
        self._is_valid_sample = False

    def release_unassigned(self, routing: RoutingIndex) -> None:
        """Release functions that no sandbox holds any more; from any thread, also when idle."""
        unassigned = {entry.spec for entry in routing.entries.values() if not entry.addresses}
        with self._lock:
            self._wanted -= unassigned
            for spec in unassigned:
                self._mapped.pop(spec, None)
            self._selection, self._selection_state = {}, None

    def close(self) -> None:
        """Stop the mapping thread."""
        self._mapping_executor.shutdown(wait=False, cancel_futures=True)

    def _apply_routing(self, routing: RoutingIndex) -> None:
        specs_by_layer = tuple(tuple(f.spec for f in layer.functions) for layer in routing.layers)
        if specs_by_layer != self._specs_by_layer:  # the first table, or other blocks
            self._specs_by_layer = specs_by_layer
            n_functions = max(map(len, specs_by_layer), default=0)
            self._policy = ColocationPolicy(n_functions, len(specs_by_layer))
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
        self._n_passes = 0
        self._set_wanted(self._wanted & self._find_hottest())

    def _find_same_node(self, addresses: Collection[str]) -> Mapping[str, bool]:
        """Return for each address whether its sandbox runs on this machine."""
        is_same_node = {}
        for address in addresses:
            host, _, port = address.rpartition(":")
            is_loopback = host in LOOPBACK_HOSTS and port.isdecimal()
            is_same_node[address] = (
                is_loopback and unix_socket_path(self._socket_dir, int(port)).exists()
            )
        return is_same_node

    def _find_hottest(self) -> frozenset[FunctionSpec]:
        max_functions = self._policy.choices[-1]
        hottest = frozenset(
            specs[i]
            for layer, specs in enumerate(self._specs_by_layer)
            for i in self._ranking.hottest(layer, max_functions, self._same_node[layer])
        )
        return hottest - self._corrupted

    def _set_wanted(self, specs: frozenset[FunctionSpec]) -> None:
        """Keep exactly these functions; new ones are mapped in the background."""
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
            if spec in self._wanted:  # may have changed while mapping
                self._mapped[spec] = function


class ColocationPolicy:
    """Decides how many of each layer's functions to colocate, by batch size.

    Args:
        n_functions: number of functions in the layer with the most.
        n_layers: number of layers.
    """

    def __init__(self, n_functions: int, n_layers: int) -> None:
        self.choices = colocation_choices(n_functions, n_layers)
        self._trials: dict[int, PairedTrials] = {}

    def n_colocated(self, n_rows: int) -> int:
        """Return how many of each layer's functions to colocate in a pass of `n_rows` rows."""
        return self.choices[self._trials_for(n_rows).choice] if n_rows <= MAX_COLOCATED_ROWS else 0

    def record_pass(self, n_rows: int, elapsed_s: float) -> None:
        """Record the total time of such a pass's layers."""
        if n_rows <= MAX_COLOCATED_ROWS:
            self._trials_for(n_rows).record_pass(elapsed_s)

    def _trials_for(self, n_rows: int) -> PairedTrials:
        size = n_rows.bit_length()
        trials = self._trials.get(size)
        if trials is None:
            trials = self._trials[size] = PairedTrials(len(self.choices))
        if not trials.is_decided:
            decided = [other for other, known in self._trials.items() if known.is_decided]
            if decided:
                nearest = min(decided, key=lambda other: abs(other - size))
                trials.assume(self._trials[nearest].best)
        return trials


def colocation_choices(n_functions: int, n_layers: int) -> tuple[int, ...]:
    """Return how many of a layer's functions may be colocated, ascending from 0.

    Args:
        n_functions: number of functions in the layer with the most.
        n_layers: number of layers.
    """
    half = min(n_functions // 2, MAX_COLOCATED_FUNCTIONS)
    some = (0, *(n for n in (1, 2, 4) if n <= half))
    return (*some, n_functions) if 0 < n_functions * n_layers <= MAX_MODEL_FUNCTIONS else some


class PairedTrials:
    """Finds the fastest of several choices by trials that pair each with the first.

    A trial is two consecutive passes, the baseline's and the candidate's. Their ratio is robust
    against a machine that slows down over time, and the median of ratios against outliers.

    Args:
        n_choices: number of choices; the first is the baseline.

    Attributes:
        best: the fastest choice so far.
        is_decided: whether there were enough trials of every choice.
    """

    def __init__(self, n_choices: int) -> None:
        self.best = 0
        self.is_decided = n_choices < 2
        self._ratios = [deque[float](maxlen=MAX_KEPT_TRIALS) for _ in range(n_choices)]
        self._is_assumed = False
        self._n_passes = 0
        self._candidate = 0  # 0: no trial is running
        self._baseline_s: float | None = None  # of the running trial
        self._rotation = 0

    def assume(self, best: int) -> None:
        """Use this choice until the trials decide, which are rarer then."""
        if not self._is_assumed:
            self._is_assumed, self._candidate, self._baseline_s = True, 0, None
        self.best = best

    @property
    def choice(self) -> int:
        """The choice for the next pass; constant until `record_pass`."""
        if not self._candidate:
            return self.best
        return 0 if self._baseline_s is None else self._candidate

    def record_pass(self, elapsed_s: float) -> None:
        """Record the time of a pass that used `choice`."""
        if not self._candidate:
            self._n_passes += 1
            self._candidate = self._next_candidate()
        elif self._baseline_s is None:
            self._baseline_s = elapsed_s
        else:
            self._ratios[self._candidate].append(elapsed_s / self._baseline_s)
            self._candidate, self._baseline_s, self._n_passes = 0, None, 0
            self.is_decided = not self._undersampled()
            self.best = self._find_best()
            self._candidate = self._next_candidate()

    def _next_candidate(self) -> int:
        candidates = range(1, len(self._ratios))
        if not self.is_decided:
            if self._is_assumed and self._n_passes < PASSES_BETWEEN_FIRST_TRIALS:
                return 0
            return min(self._undersampled(), key=lambda i: len(self._ratios[i]))
        if not candidates or self._n_passes < PASSES_BETWEEN_TRIALS:
            return 0
        self._rotation = self._rotation % len(candidates) + 1
        return self._rotation

    def _undersampled(self) -> list[int]:
        return [i for i in range(1, len(self._ratios)) if len(self._ratios[i]) < MIN_TRIALS]

    def _find_best(self) -> int:
        if not self.is_decided:
            return self.best
        ratios = [1.0, *(self._median_ratio(i) for i in range(1, len(self._ratios)))]
        fastest = min(range(len(ratios)), key=ratios.__getitem__)
        return fastest if ratios[fastest] < ratios[self.best] - MIN_GAIN else self.best

    def _median_ratio(self, choice: int) -> float:
        ratios = self._ratios[choice]
        return statistics.median(ratios) if len(ratios) >= MIN_TRIALS else float("inf")


class FunctionRanking:
    """Ranks each layer's functions by their recent number of pairs, with hysteresis.

    Args:
        n_functions: number of functions of each layer.
        n_hot: number of functions of each layer that are hot.

    Attributes:
        version: increases whenever the functions are ranked anew.
    """

    def __init__(self, n_functions: Sequence[int], n_hot: int) -> None:
        self.version = 0
        self._n_hot = n_hot
        self._pairs: list[NDArray[np.float64]] = [np.zeros(n) for n in n_functions]
        self._ranked: list[tuple[int, ...]] = [tuple(range(n)) for n in n_functions]
        self._n_passes = 0

    def record_pairs(self, layer: int, function_index: int, n_pairs: int) -> None:
        """Count pairs of a layer's function."""
        self._pairs[layer][function_index] += n_pairs

    @property
    def ranks_next(self) -> bool:
        """Whether the next `finish_pass` ranks the functions."""
        return self._n_passes % PASSES_BETWEEN_RANKINGS == 0

    def finish_pass(self) -> bool:
        """Finish a pass; now and then rank the functions anew, decay the counts and return True."""
        is_due = self.ranks_next
        self._n_passes += 1
        if not is_due:
            return False
        for layer, pairs in enumerate(self._pairs):
            lead = np.ones(len(pairs))
            lead[list(self._ranked[layer][: self._n_hot])] = MIN_LEAD
            self._ranked[layer] = tuple(int(i) for i in np.argsort(-pairs * lead, kind="stable"))
            pairs *= DECAY**PASSES_BETWEEN_RANKINGS
        self.version += 1
        return True

    def hottest(self, layer: int, n: int, candidates: Collection[int]) -> tuple[int, ...]:
        """Return the positions of the at most `n` hottest of a layer's candidates."""
        return tuple(i for i in self._ranked[layer] if i in candidates)[:n]
