"""Local fallback: functions mapped from the store and computed in the router's process.

The last resort for calls that no sandbox answers. `map_function` and `compute_function` translate
store and block errors for every in-process computation, colocated functions included.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.wire import ExpertRequest
from faasmoe_expert.errors import BadAttachment, BlockCorrupted
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

MAX_MAPPED_FUNCTIONS = 128  # mapped, not copied: an entry costs address space and a few kB


FindFunction = Callable[[FunctionSpec], ExpertFunction | None]
"""Returns a function that another part of this process has mapped, None if it has not."""


class LocalFunctions:
    """LRU cache of functions that are mapped from the store on first use.

    Belongs to the engine's thread, except for `mapped` and `release`.

    Args:
        store: the prepared model.
        find: finds a function that is mapped already, to be shared.
    """

    def __init__(self, store: Store, *, find: FindFunction = lambda spec: None) -> None:
        self._store = store
        self._find = find
        self._unshared: set[FunctionSpec] = set()  # what was found failed verification
        self._lock = threading.Lock()  # guards _functions
        self._functions: OrderedDict[FunctionSpec, ExpertFunction] = OrderedDict()

    def mapped(self) -> Mapping[FunctionSpec, ExpertFunction]:
        """Return the functions that are mapped now; safe from any thread."""
        with self._lock:
            return dict(self._functions)

    def release(self) -> None:
        """Unmap all; the next call of one maps it again. Safe from any thread."""
        with self._lock:
            self._functions.clear()

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return the output of function `spec`: float32 [R, H], or [P, H] unreduced.

        Raises:
            StoreUnreadable: the store no longer has the function.
            StoreCorrupted: the store's bytes of the function fail verification.
        """
        try:
            return compute_function(self.map(spec), request)
        except StoreCorrupted:
            self._unshared.add(spec)
            with self._lock:  # its file may have been replaced: mapped anew next time
                self._functions.pop(spec, None)
            raise

    def map(self, spec: FunctionSpec, *, until_s: float = math.inf) -> ExpertFunction:
        """Return a function, mapped if it is not yet; raises as `map_function`."""
        function = self._functions.get(spec)
        if function is None and spec not in self._unshared:
            function = self._find(spec)
        if function is None:
            function = map_function(spec, self._store, until_s=until_s)
        with self._lock:
            self._functions[spec] = function
            self._functions.move_to_end(spec)
            if len(self._functions) > MAX_MAPPED_FUNCTIONS:
                self._functions.popitem(last=False)
        return function


def compute_function(function: ExpertFunction, request: ExpertRequest) -> Tensor:
    """Return the output of a mapped function; raises StoreCorrupted."""
    try:
        return function.compute(request)
    except BlockCorrupted as error:
        raise _corrupted_error(function.spec, error) from error


def map_function(spec: FunctionSpec, store: Store, *, until_s: float = math.inf) -> ExpertFunction:
    """Map a function from the store and verify its bytes; safe from any thread.

    Args:
        spec: the function.
        store: the prepared model.
        until_s: until when (monotonic clock) to verify the bytes of experts.

    Raises:
        OutOfTime: not all of them were verified until then; those that were will not be again.
        StoreUnreadable: the store no longer has the function.
        StoreCorrupted: the store's bytes of the function fail verification.
    """
    try:
        return ExpertFunction(spec, store, until_s=until_s)
    except BlockCorrupted as error:
        raise _corrupted_error(spec, error) from error
    except (BadAttachment, StoreError, OSError) as error:
        raise StoreUnreadable(
            f"no sandbox serves function {spec.id}, and the store {store.path} "
            f"cannot serve as fallback: {error}"
        ) from error


def _corrupted_error(spec: FunctionSpec, error: BlockCorrupted) -> StoreCorrupted:
    return StoreCorrupted(f"no sandbox serves function {spec.id}, and {error}")
