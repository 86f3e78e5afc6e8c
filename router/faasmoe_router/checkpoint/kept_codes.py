"""Decides which parameters keep the codes that a checkpoint is published with, and reads them.

A parameter keeps its codes if the store has a scheme for them, and the conversion only renames the
tensor, or stacks tensors and concatenates their rows: then codes, scales and so on can be moved as
the weights would be. Experts keep them unless another scheme is asked for, the router's linear
layers only if their very scheme is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization
from faasmoe_contracts.store.quantization import MAX_PARTS
from faasmoe_transformers.model_skeleton import ExpertsForm, ModelSkeleton
from faasmoe_transformers.weight_conversion import (
    SLICE_BYTES,
    ConversionJob,
    ParameterSlice,
    moves_rows_only,
    unconverted_parts,
)


@runtime_checkable
class CodedSource(Protocol):
    """A tensor of a checkpoint whose codes a store may keep."""

    @property
    def stored(self) -> TensorQuantization | None:
        """How a store holds the codes without loss; None if it cannot."""

    def get_shape(self) -> list[int]:
        """Return the shape of the weights."""

    def get_dtype(self) -> str:
        """Return the name of the dtype that it is decoded to, as in safetensors."""

    def __getitem__(self, index: Any) -> Tensor:
        """Read the indexed part of the weights."""

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes, scales and so on of rows of dimension 0 by suffix, as a store has them."""

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor of the checkpoint whose bytes these are; None if they are made."""

    def check_scales(self) -> None:
        """Read the scales alone, if they are apart, and refuse those that are none."""


@dataclass(frozen=True, slots=True)
class KeptParameter:
    """A parameter that is stored in the codes of the checkpoint.

    Attributes:
        name: its name in the model.
        quantization: how it is stored.
        parts: the tensors that it is made of: those of each index of dimension 0, whose rows follow
            each other, or one for all.
        is_stacked: whether each index of dimension 0 has tensors of its own.
    """

    name: str
    quantization: TensorQuantization
    parts: tuple[tuple[CodedSource, ...], ...]
    is_stacked: bool

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions before the matrix."""
        if self.is_stacked:
            return (len(self.parts),)
        return tuple(self.parts[0][0].get_shape()[:-2])

    def slices(self) -> Iterator[ParameterSlice]:
        """Read codes, scales and so on, and yield them as they are stored, some rows at a time."""
        n_rows, row_bytes = len(self.parts), self.quantization.size_bytes
        if not self.is_stacked:
            n_rows, *matrix = self.parts[0][0].get_shape()
            row_bytes //= 1 if len(matrix) > 1 else n_rows
        step = max(1, SLICE_BYTES // max(1, row_bytes))
        if not self.is_stacked and self.quantization.group_rows > 1 and len(matrix) == 1:
            step = n_rows  # rows share scales
        for first in range(0, n_rows, step):
            for suffix, tensor in self._read(first, min(first + step, n_rows)).items():
                yield ParameterSlice(self.name + suffix, first, tensor)

    def _read(self, first: int, end: int) -> Mapping[str, Tensor]:
        if not self.is_stacked:
            return self.parts[0][0].read_stored(first, end)
        experts = [
            [tensor.read_stored(0, tensor.get_shape()[0]) for tensor in row]
            for row in self.parts[first:end]
        ]
        return {
            suffix: torch.stack([torch.cat([part[suffix] for part in row]) for row in experts])
            for suffix in self.quantization.components
        }

    def check_scales(self) -> None:
        """Read the scales alone; raises SourceUnsupported if one is not finite or zero."""
        for tensor in (tensor for row in self.parts for tensor in row):
            tensor.check_scales()

    def sources_of(self, suffix: str) -> list[str] | None:
        """Return the tensors of the checkpoint that hold a component, in the order of its bytes.

        None if it is made of them, or if no kernel reads it there: zero points in two places.
        """
        if len(self.parts[0]) > 1 and not self.quantization.symmetric:
            return None
        names = [tensor.source_of(suffix) for row in self.parts for tensor in row]
        return None if None in names else [name for name in names if name is not None]


def plan_kept_codes(
    skeleton: ModelSkeleton,
    jobs: Sequence[ConversionJob],
    asked: QuantizationEntry,
    planned: Mapping[str, TensorQuantization],
    *,
    shared: Collection[str] = (),
) -> dict[str, KeptParameter]:
    """Return the parameters that keep their codes, by name.

    Args:
        skeleton: the model.
        jobs: the conversions of its parameters.
        asked: what to quantise.
        planned: how the router's parameters would be quantised otherwise, by name.
        shared: parameters that several modules share, which are stored as floats.
    """
    transposed = {
        f"{experts.name}.{local}": ExpertsForm.of(experts.module).is_transposed
        for experts in skeleton.experts_modules
        for local in experts.parameters
    }
    kept: dict[str, KeptParameter] = {}
    for job in jobs:
        parameter = None if job.name in shared else _kept_parameter(job)
        if parameter is None:
            continue
        entry = parameter.quantization
        if job.name in transposed:
            is_kept = asked.experts in ("none", entry.scheme)
            is_kept = is_kept and entry.transposed == transposed[job.name]
        else:
            is_kept = job.name in planned and planned[job.name].scheme == entry.scheme
            is_kept = is_kept and entry.symmetric  # as linear layers of a router are computed
        if is_kept:
            kept[job.name] = parameter
    return kept


def _kept_parameter(job: ConversionJob) -> KeptParameter | None:
    """Return a job's only parameter in its codes; None if it cannot keep them."""
    if list(job.targets) != [job.name] or not moves_rows_only(job):
        return None
    parts: list[tuple[CodedSource, ...]] = []
    entries: list[TensorQuantization] = []
    for row in unconverted_parts(job):
        coded = tuple(tensor for tensor in row if isinstance(tensor, CodedSource))
        stored = [tensor.stored for tensor in coded]
        if len(coded) < len(row) or None in stored:
            return None
        parts.append(coded)
        entries += [entry for entry in stored if entry is not None]
    ((_, shape),) = job.targets.items()
    quantization = _common_scheme(entries, shape, len(parts[0]))
    if quantization is None:
        return None
    is_stacked = job.renamed_tensor() is None
    return KeptParameter(job.name, quantization, tuple(parts), is_stacked)


def _common_scheme(
    entries: Sequence[TensorQuantization], shape: tuple[int, ...], n_parts: int
) -> TensorQuantization | None:
    """Return how a parameter of these tensors is stored, each of whose rows has `n_parts`."""
    first = entries[0]
    rows, columns = shape[-2:]
    if first.transposed:
        rows, columns = columns, rows
    if any(replace(entry, shape=first.shape) != first for entry in entries):
        return None
    has_parts = first.group_rows > 1 or first.scheme == "nvfp4"
    if not has_parts or n_parts == 1:
        return replace(first, shape=(rows, columns))
    is_equal = all(entry.shape == first.shape for entry in entries)
    if n_parts > MAX_PARTS or not is_equal or first.parts > 1:
        return None
    return replace(first, shape=(rows, columns), parts=n_parts)
