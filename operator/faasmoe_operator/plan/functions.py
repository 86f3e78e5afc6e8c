"""Partitions a model's experts into functions: layer shapes and granularity in, specs out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from faasmoe_contracts.routing_table import FunctionSpec, make_function_id
from faasmoe_operator.errors import PlanError

AUTO_BLOCKS_PER_LAYER = 3
"""The paper's recommendation and that of `faasmoe bench sweep` on two cores (docs/evaluation.md):
fewer, larger blocks leave cores idle; more blocks cost calls and memory."""


class LayerShape(Protocol):
    """The sizes of one MoE layer; the layers of a store's manifest implement it."""

    @property
    def index(self) -> int:
        """The layer's index in the store's manifest."""
        ...

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        ...

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        ...

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's parameters in bytes."""
        ...

    @property
    def shared_bytes(self) -> int:
        """Size in bytes of the parameters that every block of the layer needs."""
        ...


@dataclass(frozen=True, slots=True)
class Partitioning:
    """How experts are grouped into functions.

    Attributes:
        experts_per_function: number of experts of a layer in one function; None for about
            `AUTO_BLOCKS_PER_LAYER` functions for each layer.
        layers_per_function: number of consecutive layers whose blocks share one function.
    """

    experts_per_function: int | None = None
    layers_per_function: int = 1


def plan_functions(
    layers: Sequence[LayerShape], partitioning: Partitioning, *, model_digest: str, key: bytes
) -> tuple[FunctionSpec, ...]:
    """Return the functions of a model; each expert of each layer is in exactly one of them.

    The last block of a layer may be smaller. A function spans only layers with the same number of
    experts: where the number changes, a new group of layers begins.

    Args:
        layers: every MoE layer, ascending by index.
        partitioning: how experts are grouped into functions.
        model_digest: digest of the store, which the function ids depend on.
        key: secret key that makes the function ids opaque.

    Raises:
        PlanError: the model has no MoE layers or cannot be partitioned like this.
    """
    _check_partitioning(layers, partitioning)
    functions = []
    for group in _layer_groups(layers, partitioning.layers_per_function):
        indices = tuple(layer.index for layer in group)
        for experts in _blocks(group[0].num_experts, partitioning.experts_per_function):
            name = make_function_id(key, model_digest=model_digest, layers=indices, experts=experts)
            functions.append(FunctionSpec(name, indices, experts))
    return tuple(functions)


def function_bytes(function: FunctionSpec, layers: Sequence[LayerShape]) -> int:
    """Return the size of a function's weights in bytes."""
    shapes = {layer.index: layer for layer in layers}
    return sum(
        shapes[index].expert_bytes * len(function.experts) + shapes[index].shared_bytes
        for index in function.layers
    )


def largest_function_bytes(layers: Sequence[LayerShape], partitioning: Partitioning) -> int:
    """Return the size of the largest function's weights in bytes.

    Raises:
        PlanError: the model has no MoE layers or cannot be partitioned like this.
    """
    _check_partitioning(layers, partitioning)
    return max(
        _first_block_bytes(g, partitioning)
        for g in _layer_groups(layers, partitioning.layers_per_function)
    )


def _first_block_bytes(group: Sequence[LayerShape], partitioning: Partitioning) -> int:
    size = len(next(_blocks(group[0].num_experts, partitioning.experts_per_function)))
    return sum(layer.expert_bytes * size + layer.shared_bytes for layer in group)


def _check_partitioning(layers: Sequence[LayerShape], partitioning: Partitioning) -> None:
    if not layers:
        raise PlanError("layers: got a model without MoE layers, expected at least one")
    largest = max(layers, key=lambda layer: layer.num_experts)
    what = f"the experts of layer {largest.index}"
    if partitioning.experts_per_function is not None:
        _check_bounds(
            "expertsPerFunction", partitioning.experts_per_function, largest.num_experts, what
        )
    what = "the MoE layers of the model"
    _check_bounds("layersPerFunction", partitioning.layers_per_function, len(layers), what)


def _check_bounds(field: str, value: int, maximum: int, description: str) -> None:
    if value < 1:
        raise PlanError(f"spec.granularity.{field}: got {value}, expected 1 or more")
    if value > maximum:
        raise PlanError(
            f"spec.granularity.{field}: got {value}, expected at most {maximum}, {description}"
        )


def _layer_groups(
    layers: Sequence[LayerShape], layers_per_function: int
) -> Iterator[tuple[LayerShape, ...]]:
    for _, run in groupby(layers, key=lambda layer: layer.num_experts):
        same_size = tuple(run)
        for start in range(0, len(same_size), layers_per_function):
            yield same_size[start : start + layers_per_function]


def _blocks(num_experts: int, experts_per_function: int | None) -> Iterator[tuple[int, ...]]:
    size = experts_per_function or -(-num_experts // AUTO_BLOCKS_PER_LAYER)
    for start in range(0, num_experts, size):
        yield tuple(range(start, min(start + size, num_experts)))
