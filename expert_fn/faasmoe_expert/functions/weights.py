"""Parameters of a layer's experts as tensors over the store's mmap: attaching copies nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from faasmoe_expert.store import LayerMap

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
class LayerWeights:
    """One layer's expert parameters.

    Attributes:
        stacked: by name, then by global expert index; on CPU the whole mapped stack, of which only
            the pages that are read become resident, on CUDA a copy of the block's experts.
        shared: parameters that are not stacked over experts, by name.
    """

    stacked: Mapping[str, Tensor | Mapping[int, Tensor]]
    shared: Mapping[str, Tensor]


def map_weights(
    layer: LayerMap, *, n_experts: int, experts: Iterable[int], device: torch.device
) -> LayerWeights:
    """Return the parameters of `experts` on `device`; on CPU without copying."""
    stacked: dict[str, Tensor | Mapping[int, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    chosen = tuple(experts)
    for name, view in layer.tensors.items():
        whole = as_tensor(view.buffer, view.dtype, view.shape)
        if view.shape[:1] != (n_experts,):
            shared[name] = whole.to(device)
        elif device.type == "cpu":
            stacked[name] = whole
        else:
            stacked[name] = {e: whole[e].to(device, non_blocking=True) for e in chosen}
    return LayerWeights(stacked, shared)


def as_tensor(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor over `buffer`, not copied; `dtype` as safetensors names it."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)
