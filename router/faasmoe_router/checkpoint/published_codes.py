"""Tensors of a checkpoint that offer whole parameters in the codes of a store.

Experts' codes are kept unless another scheme was asked for; those of the router's linear layers
are kept if their very scheme was asked for, else the router gets the weights in its dtype. Formats
whose parameters are made of several coded weights are the subject of `kept_codes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
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


@dataclass(frozen=True, slots=True)
class PublishedParameter:
    """A parameter whose codes a store keeps.

    Attributes:
        name: the parameter.
        quantization: how it is stored.
        tensor: its codes in the checkpoint.
    """

    name: str
    quantization: TensorQuantization
    tensor: CodedTensor

    def slices(self, model: PreTrainedModel) -> Iterator[ParameterSlice]:
        """Read codes and scales and yield them as they are stored, some rows at a time."""
        n_rows, *matrix = self.tensor.get_shape()
        row_bytes = self.quantization.size_bytes // (1 if len(matrix) > 1 else n_rows)
        step = max(1, SLICE_BYTES // row_bytes)
        for first in range(0, n_rows, step):
            codes, scales = self.tensor.read_codes(first, min(first + step, n_rows))
            yield ParameterSlice(self.name, first, codes)
            yield ParameterSlice(self.name + SCALE_SUFFIX, first, scales)


def find_published_codes(
    jobs: Iterable[ConversionJob],
    asked: QuantizationEntry,
    planned: Mapping[str, TensorQuantization],
    *,
    experts: Iterable[str],
) -> dict[str, PublishedParameter]:
    """Return the parameters whose codes a store keeps, by name.

    Args:
        jobs: the conversions of the checkpoint.
        asked: what to quantise.
        planned: how the parameters would be quantised otherwise, by name.
        experts: names of the experts modules.
    """
    prefixes = tuple(f"{name}." for name in experts)
    published: dict[str, PublishedParameter] = {}
    for job in jobs:
        tensor = job.renamed_tensor()
        if not isinstance(tensor, CodedTensor) or list(job.targets) != [job.name]:
            continue
        quantization = tensor.quantization
        if quantization is None:
            continue
        is_asked = asked.experts == "none" and job.name.startswith(prefixes)
        plan = planned.get(job.name)
        if is_asked or (plan is not None and plan.scheme == quantization.scheme):
            published[job.name] = PublishedParameter(job.name, quantization, tensor)
    return published
