"""Codes that a store keeps as they were published, instead of weights that it quantises itself.

A tensor of a checkpoint may offer its codes in a scheme of the store. Experts' codes are kept
unless another scheme was asked for; those of the router's linear layers are kept if their very
scheme was asked for, else the router gets the weights in its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_router.checkpoint.slice_quantizer import QuantizationLoss
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.weight_conversion import SLICE_BYTES, ConversionJob, ParameterSlice


@runtime_checkable
class CodedTensor(Protocol):
    """A tensor of a checkpoint whose codes a store may keep."""

    @property
    def quantization(self) -> TensorQuantization | None:
        """How a store keeps the codes; None if it cannot."""

    def get_shape(self) -> list[int]:
        """Return the shape of the weights."""

    def get_dtype(self) -> str:
        """Return the name of the dtype that it is decoded to, as in safetensors."""

    def __getitem__(self, index: Any) -> Tensor:
        """Read the indexed part of the weights."""

    def read_codes(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return codes and scales of rows of dimension 0, as a store holds them."""


def find_published_codes(
    jobs: Iterable[ConversionJob],
    asked: QuantizationEntry,
    planned: Mapping[str, TensorQuantization],
    *,
    experts: Iterable[str],
) -> dict[str, CodedTensor]:
    """Return the tensors whose codes a store keeps, by the name of their parameter.

    Args:
        jobs: the conversions of the checkpoint.
        asked: what to quantise.
        planned: how the parameters would be quantised otherwise, by name.
        experts: names of the experts modules.
    """
    prefixes = tuple(f"{name}." for name in experts)
    published: dict[str, CodedTensor] = {}
    for job in jobs:
        tensor = _only_source(job)
        if tensor is None or tensor.quantization is None or list(job.targets) != [job.name]:
            continue
        scheme = tensor.quantization.scheme
        is_expert = job.name.startswith(prefixes)
        plan = planned.get(job.name)
        if (is_expert and asked.experts == "none") or (plan is not None and plan.scheme == scheme):
            published[job.name] = tensor
    return published


def _only_source(job: ConversionJob) -> CodedTensor | None:
    """Return the tensor that a job only renames; None if it does anything else."""
    sources = [tensor for tensors in job.sources.values() for tensor in tensors]
    is_renaming = len(sources) == 1 and not getattr(job.transform, "operations", None)
    return sources[0] if is_renaming and isinstance(sources[0], CodedTensor) else None


def read_published(
    name: str, tensor: CodedTensor, loss: QuantizationLoss
) -> Iterator[ParameterSlice]:
    """Yield codes and scales of a parameter, some rows at a time; they lose nothing.

    Args:
        name: the parameter.
        tensor: its codes.
        loss: the norm of the weights is added to it.

    Raises:
        SourceUnsupported: weights are too large for their squares in float32.
    """
    quantization = tensor.quantization
    assert quantization is not None
    n_rows = tensor.get_shape()[0]
    is_stacked = len(tensor.get_shape()) > 2
    row_bytes = quantization.size_bytes // (1 if is_stacked else n_rows)
    step = max(1, SLICE_BYTES // row_bytes)
    for first in range(0, n_rows, step):
        codes, scales = tensor.read_codes(first, min(first + step, n_rows))
        weights = dequantize(codes, scales, quantization)  # [rows, ...] in float32
        squared = weights.square_().sum(dtype=torch.float64).item()
        if not math.isfinite(squared):
            raise SourceUnsupported(f"{name}: got weights beyond 1e18, expected smaller ones")
        loss.add(name, 0.0, squared)
        yield ParameterSlice(name, first, codes)
        yield ParameterSlice(name + SCALE_SUFFIX, first, scales)
