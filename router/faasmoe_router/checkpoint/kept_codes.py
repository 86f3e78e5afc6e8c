"""Decides which experts keep the codes that a checkpoint is published with. Reads no weights.

A parameter keeps its codes if the store has a scheme for them and the conversion only renames,
stacks and concatenates rows: then codes and scales are converted as the weights would be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import CODE_DTYPES, SCALE_DTYPES, SCALE_SUFFIX
from faasmoe_router.checkpoint.formats.coded_weight import CodedWeight, StoredPart
from faasmoe_transformers.model_skeleton import ExpertsForm, ModelSkeleton
from faasmoe_transformers.weight_conversion import (
    ConversionJob,
    ParameterSlice,
    moves_rows_only,
    run_conversion,
)

_TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class KeptParameter:
    """A parameter that is stored in the codes of the checkpoint.

    Attributes:
        quantization: how it is stored.
        codes: the conversion of its codes.
        scales: the conversion of its scales.
    """

    quantization: TensorQuantization
    codes: ConversionJob
    scales: ConversionJob

    def slices(self, model: PreTrainedModel) -> Iterator[ParameterSlice]:
        """Read the codes and scales and yield them as they are stored, in slices."""
        yield from run_conversion(self.codes, model)
        for piece in run_conversion(self.scales, model):
            yield replace(piece, target=piece.target + SCALE_SUFFIX)


def plan_kept_codes(
    skeleton: ModelSkeleton,
    jobs: Sequence[ConversionJob],
    *,
    scheme: str,
    shared: Collection[str] = (),
) -> dict[str, KeptParameter]:
    """Return the experts' parameters that keep their codes, by name.

    Args:
        skeleton: the model.
        jobs: the conversions of its parameters.
        scheme: what the experts are to be quantised as; with `none`, every scheme is kept.
        shared: parameters that several modules share, which are stored as floats.
    """
    job_by_name = {job.name: job for job in jobs}
    kept: dict[str, KeptParameter] = {}
    for experts in skeleton.experts_modules:
        is_transposed = ExpertsForm.of(experts.module).is_transposed
        for local in experts.parameters:
            name = f"{experts.name}.{local}"
            job = None if name in shared else job_by_name.get(name)
            quantization = None if job is None else _common_scheme(job)
            if job is None or quantization is None:
                continue
            if quantization.transposed == is_transposed and scheme in ("none", quantization.scheme):
                kept[name] = _kept_parameter(job, quantization)
    return kept


def _common_scheme(job: ConversionJob) -> TensorQuantization | None:
    """Return how the job's only parameter can be stored; None if it cannot keep its codes."""
    if not moves_rows_only(job):
        return None
    entries: list[TensorQuantization] = []
    for source in (tensor for tensors in job.sources.values() for tensor in tensors):
        if not isinstance(source, CodedWeight) or source.stored is None:
            return None
        entries.append(source.stored)
    (shape,) = job.targets.values()
    rows, columns = shape[-2:]
    first = entries[0]
    if first.transposed:
        rows, columns = columns, rows
    merged = replace(first, shape=(rows, columns))
    is_same = all(replace(entry, shape=(rows, entry.shape[1])) == merged for entry in entries)
    return merged if is_same else None


def _kept_parameter(job: ConversionJob, quantization: TensorQuantization) -> KeptParameter:
    ((target, shape),) = job.targets.items()
    leading = shape[:-2]
    codes = replace(
        job,
        dtype=_TORCH_DTYPES[CODE_DTYPES[quantization.scheme]],
        sources=_stored_parts(job.sources, is_scales=False),
        targets={target: (*leading, *quantization.codes_shape)},
    )
    scales = replace(
        job,
        dtype=_TORCH_DTYPES[SCALE_DTYPES[quantization.scale_dtype]],
        sources=_stored_parts(job.sources, is_scales=True),
        targets={target: (*leading, *quantization.scales_shape)},
    )
    return KeptParameter(quantization, codes, scales)


def _stored_parts(sources: Mapping[str, list[Any]], *, is_scales: bool) -> dict[str, list[Any]]:
    return {
        pattern: [StoredPart(weight, is_scales) for weight in weights]
        for pattern, weights in sources.items()
    }
