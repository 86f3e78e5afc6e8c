"""Expert parameters of a layer as tensors: views of the mapped store, or copies on a device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from faasmoe_contracts.store import MappedLayer, TensorQuantization
from faasmoe_contracts.store.quantization import GLOBAL_SUFFIX, SCALE_SUFFIX, ZERO_SUFFIX
from faasmoe_contracts.store.tensors import TensorView
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_expert.functions.stacks import QuantizedStack, ScatteredStack, Stack, StackedBlock
from faasmoe_expert.functions.transfer import Uploader

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The expert parameters of one layer.

    Attributes:
        stacked: parameters by name, indexed by global expert index: a view of the whole mapped
            stack, of which only pages that are read become resident, or a copy of the block.
            Quantised parameters are codes and scales if mapped, dequantised if copied. A stack of
            which the store holds no copy may be scattered.
        shared: parameters that are not stacked over experts, by name.
    """

    stacked: Mapping[str, Stack]
    shared: Mapping[str, Tensor]

    @property
    def is_quantized(self) -> bool:
        """Whether some parameters are codes and scales."""
        return any(isinstance(stack, QuantizedStack) for stack in self.stacked.values())


def map_weights(
    layer: MappedLayer,
    *,
    n_experts: int,
    quantization: Mapping[str, TensorQuantization] | None = None,
) -> LayerWeights:
    """Return views of a layer's mapped parameters, without copying.

    Args:
        layer: the mapped layer.
        n_experts: number of experts of the layer.
        quantization: how its quantised parameters are stored, by name.
    """
    quantization = quantization or {}
    stacked: dict[str, Stack] = {}
    shared: dict[str, Tensor] = {}
    for name, view in _parameters(layer, quantization):
        if name in quantization:
            parts = {
                suffix: _mapped_stack(layer.tensors[name + suffix])
                for suffix in quantization[name].components
            }
            stacked[name] = QuantizedStack(
                parts[""],
                parts[SCALE_SUFFIX],
                quantization[name],
                zeros=parts.get(ZERO_SUFFIX),
                factors=parts.get(GLOBAL_SUFFIX),
            )
        elif view.is_stacked(n_experts) or not view.is_contiguous:
            stacked[name] = _mapped_stack(view)
        else:
            shared[name] = tensor_view(view.buffer, view.dtype, view.shape)
    return LayerWeights(stacked, shared)


def _mapped_stack(view: TensorView) -> Tensor | ScatteredStack:
    if not view.is_contiguous:
        return _scattered_stack(view)
    return tensor_view(view.buffer, view.dtype, view.shape)


def _scattered_stack(view: TensorView) -> ScatteredStack:
    return ScatteredStack(MappedParts(view))


class MappedParts(Sequence[tuple[Tensor, ...]]):
    """Views of the pieces of each expert, equal blocks of its rows; made when they are read.

    A function has few of a layer's experts, and to view all of them would take most of the time of
    mapping it.

    Args:
        view: the parameter, in pieces.
    """

    def __init__(self, view: TensorView) -> None:
        n_experts, rows, *rest = view.shape
        self._view = view
        self._shape = (rows // (len(view.pieces) // n_experts), *rest)
        self._made: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return self._view.shape[0]

    @overload
    def __getitem__(self, expert: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, expert: slice) -> Sequence[tuple[Tensor, ...]]: ...
    def __getitem__(self, expert: int | slice) -> tuple[Tensor, ...] | Sequence[tuple[Tensor, ...]]:
        """Return the views of one expert, or of several."""
        if isinstance(expert, slice):
            return [self[i] for i in range(*expert.indices(len(self)))]
        index = range(len(self))[expert]
        parts = self._made.get(index)
        if parts is None:
            pieces = self._view.expert_pieces(index)
            parts = tuple(tensor_view(p.buffer, self._view.dtype, self._shape) for p in pieces)
            self._made[index] = parts
        return parts


def _parameters(
    layer: MappedLayer, quantization: Mapping[str, TensorQuantization]
) -> Iterator[tuple[str, TensorView]]:
    """Yield the tensors of a layer by name, of quantised parameters only the codes."""
    beside = {
        name + suffix
        for name, entry in quantization.items()
        for suffix in entry.components
        if suffix
    }
    return ((name, view) for name, view in layer.tensors.items() if name not in beside)


def copy_weights(
    layer: MappedLayer,
    *,
    n_experts: int,
    experts: Sequence[int],
    uploader: Uploader,
    quantization: Mapping[str, TensorQuantization] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LayerWeights:
    """Copy the parameters of `experts` (ascending) to the uploader's device and wait for it.

    Args:
        layer: the mapped layer.
        n_experts: number of experts of the layer.
        experts: global indices of the experts to copy, ascending.
        uploader: copies to the device.
        quantization: how the layer's quantised parameters are stored, by name.
        dtype: dtype that these are dequantised to on the device.
    """
    quantization = quantization or {}
    stacked: dict[str, Stack] = {}
    shared: dict[str, Tensor] = {}
    position = {expert: i for i, expert in enumerate(experts)}
    for name, view in _parameters(layer, quantization):
        if name in quantization:
            views = {
                suffix: layer.tensors[name + suffix] for suffix in quantization[name].components
            }
            tensor = _upload_dequantized(views, quantization[name], experts, uploader, dtype=dtype)
            stacked[name] = StackedBlock(tensor, position)
            continue
        is_stacked = view.is_stacked(n_experts)
        shape = (len(experts), *view.shape[1:]) if is_stacked else view.shape
        target = torch.empty(shape, dtype=TORCH_DTYPES[view.dtype], device=uploader.device)
        if is_stacked:
            _upload_experts(target, view, experts, uploader)
            stacked[name] = StackedBlock(target, position)
        else:
            uploader.upload(_as_bytes(target), view.buffer)
            shared[name] = target
    uploader.synchronize()
    return LayerWeights(stacked, shared)


def _upload_dequantized(
    views: Mapping[str, TensorView],
    quantization: TensorQuantization,
    experts: Sequence[int],
    uploader: Uploader,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return parameters of experts, [n, ...], uploaded as codes and dequantised on the device.

    One expert at a time, so that little more than the result is on the device. `views` are codes,
    scales and so on by their suffix.
    """
    rows, columns = quantization.shape
    shape = (columns, rows) if quantization.transposed else (rows, columns)
    target = torch.empty((len(experts), *shape), dtype=dtype, device=uploader.device)
    for i, expert in enumerate(experts):
        parts = {suffix: _upload_one(view, expert, uploader) for suffix, view in views.items()}
        uploader.synchronize()
        target[i] = dequantize(
            parts[""],
            parts[SCALE_SUFFIX],
            quantization,
            zeros=parts.get(ZERO_SUFFIX),
            factors=parts.get(GLOBAL_SUFFIX),
        ).to(dtype)
    return target


def _upload_one(view: TensorView, expert: int, uploader: Uploader) -> Tensor:
    """Start to upload one expert's part of a stacked tensor."""
    target = torch.empty(view.shape[1:], dtype=TORCH_DTYPES[view.dtype], device=uploader.device)
    target_bytes, offset = _as_bytes(target), 0
    for piece in view.expert_pieces(expert):
        uploader.upload(target_bytes[offset : offset + piece.buffer.nbytes], piece.buffer)
        offset += piece.buffer.nbytes
    return target


def _upload_experts(
    target: Tensor, view: TensorView, experts: Sequence[int], uploader: Uploader
) -> None:
    """Copy experts to `target`, consecutive experts in one piece if they follow each other."""
    target_bytes = _as_bytes(target)  # [n * stride]
    stride = view.nbytes // view.shape[0]
    if not view.is_contiguous:
        offset = 0
        for expert in experts:
            for part in view.expert_pieces(expert):
                size_bytes = part.buffer.nbytes
                uploader.upload(target_bytes[offset : offset + size_bytes], part.buffer)
                offset += size_bytes
        return
    data = view.buffer
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
