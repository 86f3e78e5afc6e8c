"""Which kernel computes a layer's experts, and on what: the store's map, or a copy on a device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from faasmoe_expert.errors import BadAttachment
from faasmoe_expert.functions.grouped import GroupedKernel, can_group
from faasmoe_expert.functions.kernels import KernelSpec, run_gated, sum_gated
from faasmoe_expert.functions.module import ModuleKernel
from faasmoe_expert.functions.pairs import Pairs
from faasmoe_expert.functions.shipping import land, ship
from faasmoe_expert.functions.upload import Uploader
from faasmoe_expert.functions.weights import LayerWeights, copy_weights, map_weights
from faasmoe_expert.store import LayerMap, Store
from faasmoe_expert.store.manifest import LayerEntry


class Kernel(Protocol):
    """What computes one layer's pairs: from the host's memory to the host's memory."""

    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""

    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""


class GatedKernel:
    """The lean kernel over one layer's mapped weights."""

    def __init__(self, spec: KernelSpec, weights: LayerWeights) -> None:
        self._spec = spec
        self._weights = weights.stacked

    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""
        return run_gated(self._spec, self._weights, hidden, pairs)

    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""
        return sum_gated(self._spec, self._weights, hidden, pairs)


class OnDevice:
    """A kernel whose weights, and so its rows, are on a device."""

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self._kernel = kernel
        self._device = device

    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""
        return land(self._kernel.run(ship(hidden, self._device), self._shipped(pairs)))

    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""
        return land(self._kernel.sum(ship(hidden, self._device), self._shipped(pairs)))

    def _shipped(self, pairs: Pairs) -> Pairs:
        return Pairs(pairs.row, pairs.expert, ship(pairs.weight, self._device))


def layer_kernel(
    store: Store,
    layer: LayerEntry,
    mapped: LayerMap,
    experts: tuple[int, ...],
    uploader: Uploader | None,
) -> Kernel:
    """Return what computes some experts of a layer; raises BadAttachment if nothing can.

    Args:
        store: where the layer lies.
        layer: its entry in the manifest.
        mapped: its bytes.
        experts: those that are computed, ascending.
        uploader: copies them to a device; None leaves them on the map.
    """
    n_experts = layer.num_experts
    try:
        if uploader is None:
            return _family_kernel(store, layer, map_weights(mapped, n_experts=n_experts), experts)
        weights = copy_weights(mapped, n_experts=n_experts, experts=experts, uploader=uploader)
        device = uploader.device
        if layer.kernel is not None and can_group(weights, device):
            return GroupedKernel(KernelSpec.from_json(layer.kernel), weights, experts, device)
        return OnDevice(_family_kernel(store, layer, weights, experts), device)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise BadAttachment(
            f"store: layer {layer.index} of {store.manifest.model.architecture} cannot be "
            f"computed: {error}",
            field="store",
        ) from error


def _family_kernel(
    store: Store, layer: LayerEntry, weights: LayerWeights, experts: tuple[int, ...]
) -> Kernel:
    """Return the lean kernel if the layer has one, else its family's own module."""
    if layer.kernel is not None:
        return GatedKernel(KernelSpec.from_json(layer.kernel), weights)
    architecture = store.manifest.model.architecture
    return ModuleKernel.from_store(store.path / "model", architecture, layer.name, weights, experts)
