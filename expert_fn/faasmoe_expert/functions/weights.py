"""Expert parameters of a layer as tensors: views of the mapped store, or copies on a device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faasmoe_contracts.store import MappedLayer
from faasmoe_expert.functions.transfer import Uploader

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StackedBlock:
    """One stacked parameter, copied for the E experts of a block only.

    Attributes:
        tensor: values of the block's experts, [E, ...].
        position: index into `tensor` by global expert index.
    """

    tensor: Tensor
    position: Mapping[int, int]

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return the parameter of one global expert index, [...]."""
        return self.tensor[self.position[expert]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The expert parameters of one layer.

    Attributes:
        stacked: parameters by name, indexed by global expert index: a view of the whole mapped
            stack, of which only pages that are read become resident, or a copy of the block.
        shared: parameters that are not stacked over experts, by name.
    """

    stacked: Mapping[str, Tensor | StackedBlock]
    shared: Mapping[str, Tensor]


def map_weights(layer: MappedLayer, *, n_experts: int) -> LayerWeights:
    """Return views of a layer's mapped parameters, without copying."""
    stacked: dict[str, Tensor | StackedBlock] = {}
    shared: dict[str, Tensor] = {}
    for name, view in layer.tensors.items():
        destination = stacked if view.shape[:1] == (n_experts,) else shared
        destination[name] = tensor_view(view.buffer, view.dtype, view.shape)
    return LayerWeights(stacked, shared)


def copy_weights(
    layer: MappedLayer, *, n_experts: int, experts: Sequence[int], uploader: Uploader
) -> LayerWeights:
    """Copy the parameters of `experts` (ascending) to the uploader's device and wait for it."""
    stacked: dict[str, Tensor | StackedBlock] = {}
    shared: dict[str, Tensor] = {}
    position = {expert: i for i, expert in enumerate(experts)}
    for name, view in layer.tensors.items():
        data = view.buffer.cast("B")
        is_stacked = view.shape[:1] == (n_experts,)
        shape = (len(experts), *view.shape[1:]) if is_stacked else view.shape
        target = torch.empty(shape, dtype=TORCH_DTYPES[view.dtype], device=uploader.device)
        if is_stacked:
            _upload_experts(target, data, experts, len(data) // n_experts, uploader)
            stacked[name] = StackedBlock(target, position)
        else:
            uploader.upload(_as_bytes(target), data)
            shared[name] = target
    uploader.synchronize()
    return LayerWeights(stacked, shared)


def _upload_experts(
    target: Tensor, data: memoryview, experts: Sequence[int], stride: int, uploader: Uploader
) -> None:
    """Copy experts of `stride` bytes each, consecutive experts in one piece."""
    target_bytes = _as_bytes(target)  # [n * stride]
    for first, count in consecutive_runs(experts):
        offset = experts.index(first) * stride
        piece = data[first * stride : (first + count) * stride]
        uploader.upload(target_bytes[offset : offset + len(piece)], piece)


def consecutive_runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) for each run of consecutive integers in ascending `indices`."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], i - start
            start = i


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def tensor_view(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor view of `buffer`; `dtype` is a key of TORCH_DTYPES, a safetensors name."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)
