"""The function table in the form that dispatch needs: expert → function → addresses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionSpec, FunctionTable, TableError
from faasmoe_router.dispatch.needs import needs_of


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
    """All layers' functions at one version of the table; replaced as a whole.

    Attributes:
        version: the table's version.
        layers: each MoE layer's functions.
        entries: every function by its id, in the table's order.
        needs: the fewest tokens that probably need each function.
        missing: ids of the functions without an address, in the table's order.
        complete_below: batches of fewer tokens than this need no function that is missing.
    """

    version: int
    layers: tuple[LayerRouting, ...]
    entries: Mapping[str, FunctionEntry]
    needs: Mapping[str, int]
    missing: tuple[str, ...] = dataclasses.field(init=False)
    complete_below: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Derive what is asked for at every request."""
        missing = tuple(name for name, entry in self.entries.items() if not entry.addresses)
        bound = min((self.needs[name] for name in missing), default=float("inf"))
        object.__setattr__(self, "missing", missing)
        object.__setattr__(self, "complete_below", bound)

    def addresses(self) -> frozenset[str]:
        """Return every address that a call may go to."""
        return frozenset(a for entry in self.entries.values() for a in entry.addresses)

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
        layers = tuple(
            _layer(layer.index, layer.num_experts, entries)
            for layer, entries in zip(manifest.layers, by_layer, strict=True)
        )
        entries = {entry.spec.id: entry for entry in table.functions}
        if len(entries) < len(table.functions):
            raise TableError("functions: got an id twice, expected one entry for each function")
        needs = {name: needs_of(entry.spec, store) for name, entry in entries.items()}
        return cls(table.version, layers, entries, needs)

    @classmethod
    def before_any_table(cls, store: Store) -> Routing:
        """Return a routing that has no function to call: each layer is one block without a name."""
        layers = tuple(
            LayerRouting(
                np.zeros(layer.num_experts, dtype=np.int32),
                (
                    FunctionEntry(
                        FunctionSpec(
                            f"layer{layer.index}", (layer.index,), tuple(range(layer.num_experts))
                        )
                    ),
                ),
            )
            for layer in store.manifest.layers
        )
        return cls(0, layers, {}, {})

    def moved(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> Routing:
        """Return this routing with other addresses for some functions; raises TableError."""
        entries = dict(self.entries)
        touched: set[int] = set()
        for name, places in addresses.items():
            if name not in entries:
                raise TableError(f"functions: got {name}, expected an id of the table")
            entries[name] = FunctionEntry(entries[name].spec, places)
            touched.update(entries[name].spec.layers)
        layers = tuple(
            LayerRouting(layer.function_of, tuple(entries[f.spec.id] for f in layer.functions))
            if index in touched
            else layer
            for index, layer in enumerate(self.layers)
        )
        return Routing(version, layers, entries, self.needs)

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions that so many tokens probably need and that have no address."""
        if n_tokens < self.complete_below:
            return ()
        return tuple(name for name in self.missing if self.needs[name] <= n_tokens)


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
