"""The routing table in the form that dispatch needs: expert → function → addresses.

Also estimates from how many tokens on a function is more likely called than not. A prompt's
routing is only known layer by layer, too late to activate its functions together. But a function
is skipped only if none of the prompt's n tokens picks any of its m of E experts in any of its
layers, which evenly spread top-k routing does with probability (1 - m/E) ** (k * n): for blocks of
a third of the experts and top-4 that is 20% at one token and 0.7% at three, and even a single
expert of 60 is likely called from 11 tokens on. So any prompt of more than a few tokens needs all
functions of all layers. Waiting for a function needlessly costs its activation, in parallel with
the others; not waiting for one stalls the whole batch mid-pass. Hence the threshold of one half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faasmoe_contracts.routing_table import (
    FunctionEndpoints,
    FunctionSpec,
    RoutingTable,
    RoutingTableError,
)
from faasmoe_contracts.store import Store

LIKELY_PROBABILITY = 0.5


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's functions.

    Attributes:
        function_of: position in `functions` of each expert's function, int32 [E].
        functions: the functions of this layer, in the table's order.
    """

    function_of: NDArray[np.int32]
    functions: tuple[FunctionEndpoints, ...]


@dataclass(frozen=True, slots=True)
class RoutingIndex:
    """All layers' functions at one version of the table; immutable, replaced as a whole.

    Attributes:
        version: the table's version.
        layers: the functions of each MoE layer.
        entries: every function by its id, in the table's order.
        activation_thresholds: fewest tokens that probably need each function, by its id.
        missing: ids of the functions without an address, in the table's order.
        activated_below_tokens: batches of fewer tokens need no missing function.
    """

    version: int
    layers: tuple[LayerRouting, ...]
    entries: Mapping[str, FunctionEndpoints]
    activation_thresholds: Mapping[str, int]
    missing: tuple[str, ...] = dataclasses.field(init=False)
    activated_below_tokens: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Precompute what every request reads."""
        missing = tuple(name for name, entry in self.entries.items() if not entry.addresses)
        threshold = min(
            (self.activation_thresholds[name] for name in missing), default=float("inf")
        )
        object.__setattr__(self, "missing", missing)
        object.__setattr__(self, "activated_below_tokens", threshold)

    @classmethod
    def from_table(cls, table: RoutingTable, store: Store) -> RoutingIndex:
        """Index a table.

        Raises:
            RoutingTableError: the table is of another model, repeats a function id, or does not
                cover exactly the store's layers and experts.
        """
        manifest = store.manifest
        if table.model_digest != manifest.digest:
            raise RoutingTableError(
                f"model_digest: got {table.model_digest}, expected {manifest.digest}, the store's"
            )
        by_layer: list[list[FunctionEndpoints]] = [[] for _ in manifest.layers]
        for entry in table.functions:
            for layer in entry.spec.layers:
                if layer >= len(by_layer):
                    raise RoutingTableError(
                        f"layers: got {layer} in function {entry.spec.id}, "
                        f"expected indices below {len(by_layer)}"
                    )
                by_layer[layer].append(entry)
        layers = tuple(
            _build_layer(layer.index, layer.num_experts, entries)
            for layer, entries in zip(manifest.layers, by_layer, strict=True)
        )
        entries = {entry.spec.id: entry for entry in table.functions}
        if len(entries) < len(table.functions):
            raise RoutingTableError(
                "functions: got an id twice, expected one entry for each function"
            )
        activation_thresholds = {
            name: activation_threshold(entry.spec, store) for name, entry in entries.items()
        }
        return cls(table.version, layers, entries, activation_thresholds)

    @classmethod
    def empty(cls, store: Store) -> RoutingIndex:
        """Return a routing without callable functions: each layer is one unnamed block."""
        layers = tuple(
            LayerRouting(
                np.zeros(layer.num_experts, dtype=np.int32),
                (
                    FunctionEndpoints(
                        FunctionSpec(
                            f"layer{layer.index}", (layer.index,), tuple(range(layer.num_experts))
                        )
                    ),
                ),
            )
            for layer in store.manifest.layers
        )
        return cls(0, layers, {}, {})

    def with_addresses(
        self, version: int, addresses: Mapping[str, tuple[str, ...]]
    ) -> RoutingIndex:
        """Return this routing with new addresses for some functions.

        Raises:
            RoutingTableError: a function is not in the table.
        """
        entries = dict(self.entries)
        changed_layers: set[int] = set()
        for name, new_addresses in addresses.items():
            if name not in entries:
                raise RoutingTableError(f"functions: got {name}, expected an id of the table")
            entries[name] = FunctionEndpoints(entries[name].spec, new_addresses)
            changed_layers.update(entries[name].spec.layers)
        layers = tuple(
            LayerRouting(layer.function_of, tuple(entries[f.spec.id] for f in layer.functions))
            if index in changed_layers
            else layer
            for index, layer in enumerate(self.layers)
        )
        return RoutingIndex(version, layers, entries, self.activation_thresholds)

    def addresses(self) -> frozenset[str]:
        """Return all addresses of all functions."""
        return frozenset(a for entry in self.entries.values() for a in entry.addresses)

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions without an address that `n_tokens` tokens probably need."""
        if n_tokens < self.activated_below_tokens:
            return ()
        return tuple(name for name in self.missing if self.activation_thresholds[name] <= n_tokens)


def activation_threshold(spec: FunctionSpec, store: Store) -> int:
    """Return the fewest tokens that probably need this function of the store's model."""
    layers = [store.manifest.layers[index] for index in spec.layers]
    return activation_threshold_tokens(
        len(spec.experts), [(layer.num_experts, layer.top_k) for layer in layers]
    )


def activation_threshold_tokens(
    n_block_experts: int, layer_shapes: Sequence[tuple[int, int]]
) -> int:
    """Return the fewest tokens that probably need a function.

    Args:
        n_block_experts: number of experts that the function holds in each of its layers.
        layer_shapes: (number of experts, top-k) of each of its layers.
    """
    log_miss_probability = 0.0  # log of the probability that one token skips the function
    for n_experts, top_k in layer_shapes:
        if n_block_experts >= n_experts:
            return 1
        log_miss_probability += top_k * math.log1p(-n_block_experts / n_experts)
    return max(1, math.ceil(math.log(1 - LIKELY_PROBABILITY) / log_miss_probability))


def _build_layer(
    index: int, n_experts: int, functions: Sequence[FunctionEndpoints]
) -> LayerRouting:
    function_of = np.full(n_experts, -1, dtype=np.int32)
    for position, entry in enumerate(functions):
        if entry.spec.experts[-1] >= n_experts:
            raise RoutingTableError(
                f"experts: got {entry.spec.experts[-1]} in function {entry.spec.id}, expected "
                f"indices below {n_experts}, the experts of layer {index}"
            )
        function_of[list(entry.spec.experts)] = position
    uncovered = np.flatnonzero(function_of < 0)
    if len(uncovered):
        raise RoutingTableError(
            f"functions: layer {index} expert {uncovered[0]} is in no function, "
            f"expected every expert in one"
        )
    return LayerRouting(function_of, tuple(functions))
