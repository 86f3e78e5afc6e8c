"""Overflow: functions that have no place in limited memory are computed in the router's process.

Where `experts.memory` is less than the experts take, some functions have no sandbox however long a
request waits, and every prompt of more than a few tokens needs all of them. Then no call waits:
what has no address is computed from the mapped store, in the page cache, and joins the native path
once it is mapped. The autoscaler sees the load as that of any function, so the control plane gives
the memory to functions in use, and takes it only from those that are not.

A function is mapped when a pass needs it, and released once it has an address, or once the whole
model is at zero.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import ExpertRequest
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.dispatch.local_functions import compute_function, map_function
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

Selection = Mapping[tuple[int, FunctionSpec], ExpertFunction]


def is_memory_limited(store: Store, limit_bytes: int | None) -> bool:
    """Return whether a limit of all functions' memory leaves some of a store's experts out."""
    if limit_bytes is None:
        return False
    layers = store.manifest.layers
    return sum(layer.expert_bytes * layer.num_experts for layer in layers) > limit_bytes


class OverflowFunctions:
    """The functions without an address, mapped from the store.

    Belongs to the engine's thread, except for `release`. A background thread maps functions.

    Args:
        store: the prepared model.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._routing: RoutingIndex | None = None
        self._lock = threading.Lock()  # guards _mapped, _wanted and _selection
        self._mapped: dict[FunctionSpec, ExpertFunction] = {}
        self._wanted: frozenset[FunctionSpec] = frozenset()
        self._selection: Selection | None = None  # None: to be made anew
        self._mapping_executor = ThreadPoolExecutor(1, thread_name_prefix="overflow")

    @property
    def mapped(self) -> Collection[FunctionSpec]:
        """Functions that are mapped now; safe from any thread."""
        with self._lock:
            return frozenset(self._mapped)

    def start_pass(self, routing: RoutingIndex) -> None:
        """Start a forward pass with this routing: its missing functions are mapped."""
        if routing is self._routing:
            return
        self._routing = routing
        missing = [routing.entries[name].spec for name in routing.missing]
        with self._lock:
            new = [spec for spec in missing if spec not in self._wanted]
            self._set_wanted(frozenset(missing))
        for spec in new:
            self._mapping_executor.submit(self._map_wanted, spec)

    def selection(self) -> Selection:
        """Return what is mapped, by layer; the mapping is replaced when that changes."""
        with self._lock:
            if self._selection is None:
                self._selection = {
                    (layer, spec): function
                    for spec, function in self._mapped.items()
                    for layer in spec.layers
                }
            return self._selection

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return the output of a function: float32 [R, H], or [P, H] unreduced; maps it if need be.

        Raises:
            StoreUnreadable: the store no longer has the function.
            StoreCorrupted: the store's bytes of the function fail verification.
        """
        with self._lock:
            function = self._mapped.get(spec)
        if function is None:
            function = map_function(spec, self._store)
            self._add(spec, function)
        try:
            return compute_function(function, request)
        except StoreCorrupted:
            with self._lock:  # its file may have been replaced: mapped anew next time
                self._mapped.pop(spec, None)
                self._selection = None
            raise

    def release(self, routing: RoutingIndex) -> None:
        """Release what has an address, or all if the model is at zero; from any thread."""
        is_at_zero = len(routing.missing) == len(routing.entries)
        missing = () if is_at_zero else routing.missing
        with self._lock:
            kept = self._wanted & {routing.entries[name].spec for name in missing}
            self._set_wanted(kept)
            self._routing = None  # the next pass maps what it needs

    def close(self) -> None:
        """Stop the mapping thread."""
        self._mapping_executor.shutdown(wait=False, cancel_futures=True)

    def _set_wanted(self, specs: frozenset[FunctionSpec]) -> None:
        self._wanted = specs
        for spec in self._mapped.keys() - specs:
            del self._mapped[spec]
            self._selection = None

    def _map_wanted(self, spec: FunctionSpec) -> None:
        with self._lock:
            if spec not in self._wanted or spec in self._mapped:
                return
        try:
            function = map_function(spec, self._store)
        except (StoreCorrupted, StoreUnreadable) as error:  # a pass that needs it fails with it
            logger.error("Function %s cannot be computed in the router: %s", spec.id, error)
            return
        self._add(spec, function)

    def _add(self, spec: FunctionSpec, function: ExpertFunction) -> None:
        with self._lock:
            if spec in self._wanted and spec not in self._mapped:  # may have changed meanwhile
                self._mapped[spec] = function
                self._selection = None
