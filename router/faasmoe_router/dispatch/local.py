"""Functions computed in the router itself, from the store: the last resort of a call."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import Request

MAX_FUNCTIONS = 128  # mapped, not copied: an entry costs address space and some kB


class LocalFunctions:
    """Functions mapped from the store when they are first needed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._functions: OrderedDict[FunctionSpec, ExpertFunction] = OrderedDict()

    def compute(self, spec: FunctionSpec, request: Request) -> Tensor:
        """Return what the function `spec` answers to `request`: [T, H], or [P, H] unreduced."""
        function = self._functions.pop(spec, None)
        if function is None:
            function = ExpertFunction(spec, self._store, device=torch.device("cpu"))
        self._functions[spec] = function
        if len(self._functions) > MAX_FUNCTIONS:
            self._functions.popitem(last=False)
        return function.compute(request)
