"""Files of a store without the parts that it shares: rewritten with what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from faasmoe_contracts.store import FileEntry, LayerEntry, MappedLayer, TensorView
from faasmoe_contracts.store.tensors import map_tensors
from faasmoe_expert.functions.weights import tensor_view
from faasmoe_router.checkpoint.store_plan import (
    TORCH_DTYPES,
    FileLayout,
    TensorSpec,
    plan_file,
)
from faasmoe_router.checkpoint.store_writer import PartialStoreFile
from faasmoe_transformers.weight_conversion import ParameterSlice


def write_router_remainder(store: Path, name: str, shared: Collection[str]) -> FileEntry | None:
    """Rewrite a file of the router without the shared tensors.

    Args:
        store: the store's folder.
        name: the file's name in it.
        shared: names of tensors, which may lie in other files.

    Returns:
        The file's entry; None if nothing is left, and the file is removed.
    """
    mapped = map_tensors(store / name)
    kept = {n: view for n, view in mapped.tensors.items() if n not in shared}
    layout = plan_file(name, (_spec(n, view, view.shape) for n, view in kept.items()))
    slices = (ParameterSlice(n, 0, _tensor(view)) for n, view in kept.items())
    return _write(store, layout, slices)


def write_layer_remainder(
    store: Path, layer: LayerEntry, mapped: MappedLayer, kept: Collection[int]
) -> tuple[FileEntry | None, dict[tuple[str, int], int]]:
    """Rewrite the file of a layer with some of its blocks.

    Args:
        store: the store's folder.
        layer: the layer's entry, with its file.
        mapped: the layer as mapped from the file.
        kept: experts, ascending; `num_experts` stands for what is not stacked.

    Returns:
        The file's entry, None if nothing is left and the file is removed; and the offset of each
        kept block's part of each tensor, by the tensor's name and the block.
    """
    experts = [block for block in kept if block < layer.num_experts]
    views = {
        name: view
        for name, view in mapped.tensors.items()
        if (experts if view.is_stacked(layer.num_experts) else layer.num_experts in kept)
    }
    shapes = {
        name: (len(experts), *view.shape[1:]) if view.is_stacked(layer.num_experts) else view.shape
        for name, view in views.items()
    }
    layout = plan_file(layer.file, (_spec(n, v, shapes[n]) for n, v in views.items()))
    offsets: dict[tuple[str, int], int] = {}
    for name, view in views.items():
        if not view.is_stacked(layer.num_experts):
            offsets[name, layer.num_experts] = layout.offsets[name]
            continue
        stride = view.nbytes // layer.num_experts
        for position, expert in enumerate(experts):
            offsets[name, expert] = layout.offsets[name] + position * stride
    return _write(store, layout, _layer_slices(layer, views, experts)), offsets


def _layer_slices(
    layer: LayerEntry, views: Mapping[str, TensorView], experts: list[int]
) -> Iterator[ParameterSlice]:
    for name, view in views.items():
        tensor = _tensor(view)
        if not view.is_stacked(layer.num_experts):
            yield ParameterSlice(name, 0, tensor)
            continue
        for position, expert in enumerate(experts):
            yield ParameterSlice(name, position, tensor[expert : expert + 1])


def _spec(name: str, view: TensorView, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, name, TORCH_DTYPES[view.dtype], shape)


def _tensor(view: TensorView) -> Tensor:
    return tensor_view(view.buffer, view.dtype, view.shape)


def _write(store: Path, layout: FileLayout, slices: Iterator[ParameterSlice]) -> FileEntry | None:
    if not layout.tensors:
        (store / layout.name).unlink()
        return None
    file = PartialStoreFile(store, layout)
    try:
        for parameter_slice in slices:
            file.write(parameter_slice)
        return file.finish()
    finally:
        file.close()
