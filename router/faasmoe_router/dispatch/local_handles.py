"""The functions of this process that native calls compute, by their handles in the kernel library.

Knows no routes and no sandboxes; which functions these are is decided elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.native_kernel import NativeLayer
from faasmoe_kernels.layer_calls import LayerCalls


@dataclass(frozen=True, slots=True)
class LocalEntry:
    """A function of this process that the native side knows, and its layers as they were added."""

    handle: int
    function: ExpertFunction
    layers: tuple[NativeLayer, ...]


class LocalHandleTable:
    """The functions of this process that the native side knows; methods are thread-safe.

    A function's weights stay referenced until no layer computes with it any more.
    """

    def __init__(self, calls: LayerCalls) -> None:
        self._calls = calls
        self._lock = threading.Lock()
        self._entries: dict[FunctionSpec, LocalEntry] = {}
        self._selection: Mapping[tuple[int, FunctionSpec], ExpertFunction] = {}
        self._handles: dict[tuple[int, FunctionSpec], int] = {}
        self._removed: list[LocalEntry] = []  # still in use when removed

    def handles(self) -> dict[tuple[int, FunctionSpec], int]:
        """Return the handle of each selected function, by layer; replaced, never changed."""
        return self._handles

    def update(self, selection: Mapping[tuple[int, FunctionSpec], ExpertFunction]) -> None:
        """Make exactly these functions known, as far as their kernels are native."""
        if selection is self._selection and not self._removed:
            return
        with self._lock:
            self._selection = selection
            self._remove([s for s in self._entries if s not in {spec for _, spec in selection}])
            for (_, spec), function in selection.items():
                if spec not in self._entries:
                    self._add(spec, function)
            self._refresh_handles()

    def recheck(self) -> None:
        """Add functions anew whose files were verified again since."""
        with self._lock:
            self._remove(
                [s for s, e in self._entries.items() if not e.function.has_identities(e.layers)]
            )
            self._selection = {}

    def retain(self, specs: Collection[FunctionSpec]) -> bool:
        """Forget all other functions; return whether there were any."""
        with self._lock:
            released = [s for s in self._entries if s not in specs]
            self._remove(released)
            if released:  # the selection refers to their weights
                self._selection, self._handles = {}, {}
            return bool(released)

    def _add(self, spec: FunctionSpec, function: ExpertFunction) -> None:
        layers = function.native_layers
        if len(layers) == len(spec.layers):
            handle = self._calls.add_local([layer.describe() for layer in layers])
            self._entries[spec] = LocalEntry(handle, function, layers)

    def _remove(self, specs: Sequence[FunctionSpec]) -> None:
        self._removed += [self._entries.pop(spec) for spec in specs]
        self._removed = [e for e in self._removed if not self._calls.remove_local(e.handle)]

    def _refresh_handles(self) -> None:
        self._handles = {
            key: self._entries[key[1]].handle for key in self._selection if key[1] in self._entries
        }
