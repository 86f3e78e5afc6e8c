"""The function table in the form that dispatch needs: expert → function → addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionTable, TableError


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's functions.

    Attributes:
        function_of: position in `functions` of each expert's function, int32 [E].
        functions: the functions of this layer, in the table's order.
    """

    function_of: NDArray[np.int32]
    functions: tuple[FunctionEntry, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """All layers' functions at one version of the table; replaced as a whole."""

    version: int
    layers: tuple[LayerRouting, ...]

    def addresses(self) -> frozenset[str]:
        """Return every address that a call may go to."""
        entries = (entry for layer in self.layers for entry in layer.functions)
        return frozenset(address for entry in entries for address in entry.addresses)

    @classmethod
    def from_table(cls, table: FunctionTable, store: Store) -> Routing:
        """Read a table; raises TableError if it is of another model or leaves experts out."""
        manifest = store.manifest
        if table.model_digest != manifest.digest:
            raise TableError(
                f"model_digest: got {table.model_digest}, expected {manifest.digest}, the store's"
            )
        by_layer: list[list[FunctionEntry]] = [[] for _ in manifest.layers]
        for entry in table.functions:
            for layer in entry.spec.layers:
                if layer >= len(by_layer):
                    raise TableError(
                        f"layers: got {layer} in function {entry.spec.id}, "
                        f"expected indices below {len(by_layer)}"
                    )
                by_layer[layer].append(entry)
        layers = (
            _layer(layer.index, layer.num_experts, entries)
            for layer, entries in zip(manifest.layers, by_layer, strict=True)
        )
        return cls(table.version, tuple(layers))


def _layer(index: int, n_experts: int, functions: Sequence[FunctionEntry]) -> LayerRouting:
    function_of = np.full(n_experts, -1, dtype=np.int32)
    for position, entry in enumerate(functions):
        if entry.spec.experts[-1] >= n_experts:
            raise TableError(
                f"experts: got {entry.spec.experts[-1]} in function {entry.spec.id}, expected "
                f"indices below {n_experts}, the experts of layer {index}"
            )
        function_of[list(entry.spec.experts)] = position
    left_out = np.flatnonzero(function_of < 0)
    if len(left_out):
        raise TableError(
            f"functions: layer {index} expert {left_out[0]} is in no function, "
            f"expected every expert in one"
        )
    return LayerRouting(function_of, tuple(functions))
