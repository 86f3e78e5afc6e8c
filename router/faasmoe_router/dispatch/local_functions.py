"""Local fallback: functions mapped from the store and computed in the router's process.

The last resort for calls that no sandbox answers. `map_function` and `compute_function` translate
store and block errors for every in-process computation, colocated functions included.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.wire import ExpertRequest
from faasmoe_expert.errors import BadAttachment, BlockCorrupted
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

MAX_MAPPED_FUNCTIONS = 128  # mapped, not copied: an entry costs address space and a few kB


class LocalFunctions:
    """LRU cache of functions that are mapped from the store on first use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._functions: OrderedDict[FunctionSpec, ExpertFunction] = OrderedDict()

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return the output of function `spec`: float32 [R, H], or [P, H] unreduced.

        Raises:
            StoreUnreadable: the store no longer has the function.
            StoreCorrupted: the store's bytes of the function fail verification.
        """
        try:
            return compute_function(self._get_or_map(spec), request)
        except StoreCorrupted:
            self._functions.pop(
                spec, None
            )  # its file may have been replaced: mapped anew next time
            raise

    def _get_or_map(self, spec: FunctionSpec) -> ExpertFunction:
        function = self._functions.pop(spec, None)
        if function is None:
            function = map_function(spec, self._store)
        self._functions[spec] = function
        if len(self._functions) > MAX_MAPPED_FUNCTIONS:
            self._functions.popitem(last=False)
        return function


def compute_function(function: ExpertFunction, request: ExpertRequest) -> Tensor:
    """Return the output of a mapped function; raises StoreCorrupted."""
    try:
        return function.compute(request)
    except BlockCorrupted as error:
        raise _corrupted_error(function.spec, error) from error


def map_function(spec: FunctionSpec, store: Store) -> ExpertFunction:
    """Map a function from the store and verify its bytes; safe from any thread.

    Raises:
        StoreUnreadable: the store no longer has the function.
        StoreCorrupted: the store's bytes of the function fail verification.
    """
    try:
        return ExpertFunction(spec, store)
    except BlockCorrupted as error:
        raise _corrupted_error(spec, error) from error
    except (BadAttachment, StoreError, OSError) as error:
        raise StoreUnreadable(
            f"no sandbox serves function {spec.id}, and the store {store.path} "
            f"cannot serve as fallback: {error}"
        ) from error


def _corrupted_error(spec: FunctionSpec, error: BlockCorrupted) -> StoreCorrupted:
    return StoreCorrupted(f"no sandbox serves function {spec.id}, and {error}")
