"""Colocation: computes hot functions of this machine in the router's process if that is faster.

A call to a function costs both sides a scheduling turn, about a millisecond of processor time next
to matrix products that stream weights, by measurement. Computing a function in the router saves
that, but takes a core from its other work. Which effect wins depends on cores, model and batch, so
it is measured in operation: paired trials of two consecutive forward passes, one that calls all
functions and one that computes some in the router (colocation_policy.py; docs/performance-log.md,
"hot blocks"). Some are at most half of a layer's
functions, or all of them where the model has few: then a layer waits for no other process, and all
its products share this process's threads.

Only functions whose sandboxes run on this machine qualify. They map the same pages of the store, so
nothing is in memory twice, and a function that scales to zero is released here too. The sandboxes
stay, and the load that the autoscaler sees does not change: any colocated function can be called
again at any time.

A function whose last sandbox is gone may be at zero, or about to be replaced, which nothing here
can tell apart. While passes run it stays colocated for a while, so that a lost sandbox interrupts
no pass of which it computed nothing. An idle router releases it at once.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import LOOPBACK_HOSTS, unix_socket_path
from faasmoe_contracts.wire import ExpertRequest
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.dispatch.colocation_policy import ColocationPolicy, FunctionRanking
from faasmoe_router.dispatch.layer_batch import Group
from faasmoe_router.dispatch.local_functions import compute_function, map_function
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

PASSES_BEFORE_MAPPING = 16
"""Forward passes with the same routing, before functions are mapped for it: what maps them takes
time from a first token, and from a model that answers one short request and goes to zero."""


class ColocatedFunctions:
    """The functions that are computed in the router's process.

    Belongs to the engine's thread, except for `release_unassigned` and `release_lost`. A background
    thread maps functions from the store.

    Args:
        store: the prepared model.
        socket_dir: folder of the Unix sockets of sandboxes on this machine.
        keep_lost_s: how long a function stays colocated without a sandbox while passes run.
    """

    def __init__(self, store: Store, socket_dir: Path, *, keep_lost_s: float = 0.0) -> None:
        self._store = store
        self._socket_dir = socket_dir
        self._keep_lost_s = keep_lost_s
        self._routing: RoutingIndex | None = None
        self._specs_by_layer: tuple[tuple[FunctionSpec, ...], ...] = ()
        # By layer: functions with a sandbox here, and the lost ones.
        self._same_node: list[frozenset[int]] = []
        self._mapped: dict[FunctionSpec, ExpertFunction] = {}
        self._layer_functions: Mapping[FunctionSpec, ExpertFunction] = {}  # of the current layer
        self._wanted: frozenset[FunctionSpec] = frozenset()
        self._corrupted: set[FunctionSpec] = set()  # failed verification in this process
        self._lost_at_s: dict[FunctionSpec, float] = {}  # mapped, without a sandbox since then
        self._is_idle = True
        self._lock = threading.Lock()  # guards _mapped, _wanted, _selection, _lost_at_s, _is_idle
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

    @property
    def lost(self) -> Collection[FunctionSpec]:
        """Functions that are colocated although no sandbox has them; safe from any thread."""
        with self._lock:
            return frozenset(self._lost_at_s)

    def find(self, spec: FunctionSpec) -> ExpertFunction | None:
        """Return a function if it is mapped; safe from any thread."""
        with self._lock:
            return self._mapped.get(spec)

    def start_pass(self, routing: RoutingIndex, n_rows: int, now_s: float) -> None:
        """Start a forward pass with this routing, at a monotonic time."""
        with self._lock:
            self._is_idle = False
        if routing is not self._routing:
            self._apply_routing(routing, now_s)
        if self._release_lost_before(now_s - self._keep_lost_s):
            self._same_node = self._find_same_node(routing)
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

    def release_unassigned(self, routing: RoutingIndex, now_s: float) -> None:
        """Release functions that no sandbox holds any more; from any thread, also when idle.

        What is mapped stays so until it was lost for `keep_lost_s`, or the router is idle.
        """
        unassigned = {entry.spec for entry in routing.entries.values() if not entry.addresses}
        with self._lock:
            is_kept = self._keep_lost_s > 0 and not self._is_idle
            lost = unassigned & self._mapped.keys() if is_kept else frozenset[FunctionSpec]()
            self._lost_at_s = {spec: self._lost_at_s.get(spec, now_s) for spec in lost}
            self._release(unassigned - lost)

    def release_lost(self) -> None:
        """Release what no sandbox holds, now and until a pass runs; when idle, from any thread."""
        with self._lock:
            self._is_idle = True
        self._release_lost_before(math.inf)

    def _release_lost_before(self, end_s: float) -> bool:
        """Release what was lost before a monotonic time; return whether there was anything."""
        with self._lock:
            released = {s for s, lost_at_s in self._lost_at_s.items() if lost_at_s < end_s}
            for spec in released:
                del self._lost_at_s[spec]
            self._release(released)
        return bool(released)

    def _release(self, specs: Set[FunctionSpec]) -> None:
        """Release functions; under the lock."""
        if specs & (self._mapped.keys() | self._wanted):
            self._wanted -= specs
            for spec in specs:
                self._mapped.pop(spec, None)
            self._selection, self._selection_state = {}, None

    def close(self) -> None:
        """Stop the mapping thread."""
        self._mapping_executor.shutdown(wait=False, cancel_futures=True)

    def _apply_routing(self, routing: RoutingIndex, now_s: float) -> None:
        self.release_unassigned(routing, now_s)
        specs_by_layer = tuple(tuple(f.spec for f in layer.functions) for layer in routing.layers)
        if specs_by_layer != self._specs_by_layer:  # the first table, or other blocks
            self._specs_by_layer = specs_by_layer
            n_functions = max(map(len, specs_by_layer), default=0)
            self._policy = ColocationPolicy(n_functions, len(specs_by_layer))
            n_hot = self._policy.choices[-1]
            self._ranking = FunctionRanking([len(layer) for layer in specs_by_layer], n_hot)
            self._corrupted = set()
        self._routing = routing
        self._same_node = self._find_same_node(routing)
        self._n_passes = 0
        self._set_wanted(self._wanted & self._find_hottest())

    def _find_same_node(self, routing: RoutingIndex) -> list[frozenset[int]]:
        """Return the functions of each layer with a sandbox on this machine, and the lost ones."""
        is_same_node, lost = self._are_on_this_machine(routing.addresses()), self.lost
        return [
            frozenset(
                i
                for i, f in enumerate(layer.functions)
                if f.spec in lost or any(map(is_same_node.get, f.addresses))
            )
            for layer in routing.layers
        ]

    def _are_on_this_machine(self, addresses: Collection[str]) -> Mapping[str, bool]:
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
            released = self._lost_at_s.keys() - specs
            for spec in released:
                del self._lost_at_s[spec]
        if released and self._routing is not None:  # no sandbox could have them mapped again
            self._same_node = self._find_same_node(self._routing)
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
