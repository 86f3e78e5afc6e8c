"""From the checkpoint's tensors to the model's parameters, one parameter at a time.

The rules are transformers' own (renamings and weight converters); the loop of
`convert_and_load_state_dict_in_model` is repeated here because that one keeps every tensor in a
model. Each job is first run on the meta device, which tells its targets without reading a byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from faasmoe_router.checkpoint.errors import SourceUnsupported
from faasmoe_router.checkpoint.tensors import FLOATS, LazyTensor

PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows (dimension 0) of one parameter, from `first_row` on."""

    target: str
    first_row: int
    tensor: torch.Tensor


@dataclass(slots=True)
class Job:
    """One transform, the checkpoint tensors that it takes and the parameters that it gives."""

    name: str
    transform: Any
    dtype: torch.dtype
    sources: dict[str, list[LazyTensor]] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversion:
    """All jobs of a checkpoint, and its tensors that the model has no parameter for."""

    jobs: tuple[Job, ...]
    unexpected: tuple[str, ...]


def plan_conversion(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> Conversion:
    """Match every tensor of the checkpoint to parameters of the meta `model`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = model.state_dict()
    dtypes = _Dtypes(model, dtype)
    jobs: dict[str, Job] = {}
    unexpected: list[str] = []
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = _rename(key, renamings, converters, model, expected)
        if name not in expected:
            unexpected.append(key)
            continue
        converter = WeightRenaming(key, name) if pattern is None else converter_of[pattern]
        job = jobs.setdefault(name, Job(name, converter, dtypes.of(name, expected[name])))
        _refuse_quantised(key, tensors[key], job.dtype)
        if pattern is None and job.sources:
            raise SourceUnsupported(
                f"{name}: got tensors {', '.join((*job.sources, key))} for it, expected one"
            )
        job.sources.setdefault(pattern or key, []).append(tensors[key])
    for job in jobs.values():
        _dry_run(job, model)
    return Conversion(tuple(jobs.values()), tuple(unexpected))


def run_job(job: Job, model: PreTrainedModel) -> Iterator[Piece]:
    """Read the job's tensors and give its parameters, in pieces where rows are independent."""
    if isinstance(job.transform, WeightRenaming):
        yield from _run_renaming(job)
    elif _is_stacking(job):
        yield from _run_stacking(job, model)
    else:
        sources = {
            pattern: [_reader(t, job.dtype) for t in ts] for pattern, ts in job.sources.items()
        }
        for target, tensor in _convert(job, sources, model).items():
            yield Piece(target, 0, tensor)


class _Dtypes:
    """The dtype that from_pretrained would give each parameter."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(pattern.replace("*", ".*")), kept)
            for pattern, kept in model._get_dtype_plan(dtype).items()
        ]

    def of(self, name: str, parameter: torch.Tensor) -> torch.dtype:
        """Return the dtype of the parameter `name`."""
        for pattern, kept in self._plan:
            if pattern.search(name):
                return kept
        return parameter.dtype


def _rename(
    key: str, renamings: list[Any], converters: list[Any], model: PreTrainedModel, expected: Any
) -> tuple[str, str | None]:
    prefix = model.base_model_prefix
    renamed: tuple[str, str | None] = rename_source_key(
        key, renamings, converters, prefix, expected
    )
    if renamed[0] not in expected and key in expected:
        return rename_source_key(key, [], [], prefix, expected)  # type: ignore[no-any-return]
    return renamed


def _refuse_quantised(key: str, tensor: LazyTensor, dtype: torch.dtype) -> None:
    """Refuse codes in place of weights: read as numbers, without their scales, they are noise."""
    if dtype.is_floating_point and tensor.get_dtype() not in FLOATS:
        raise SourceUnsupported(
            f"{key}: got dtype {tensor.get_dtype()}, expected one of {', '.join(FLOATS)}: "
            "quantised weights are not served"
        )


def _dry_run(job: Job, model: PreTrainedModel) -> None:
    """Convert on the meta device: fills the job's targets with names and shapes."""
    sources = {
        pattern: [torch.empty(t.get_shape(), dtype=job.dtype, device="meta") for t in ts]
        for pattern, ts in job.sources.items()
    }
    try:
        converted = _convert(job, sources, model)
    except Exception as error:
        names = ", ".join(sorted(job.sources))
        raise SourceUnsupported(f"{job.name}: cannot be made of {names}: {error}") from error
    job.targets = {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _convert(job: Job, sources: Mapping[str, list[Any]], model: Any) -> dict[str, torch.Tensor]:
    transform = deepcopy(job.transform)
    for pattern, tensors in sources.items():
        transform.collected_tensors[pattern] = tensors
    converted = transform.convert(job.name, model=model, config=model.config)
    return {
        name: value[0] if isinstance(value, list) else value for name, value in converted.items()
    }


def _reader(tensor: LazyTensor, dtype: torch.dtype) -> Any:
    return lambda: tensor[...].to(dtype)


def _run_renaming(job: Job) -> Iterator[Piece]:
    """Copy a parameter that only changes its name, by rows."""
    (source, *_) = job.sources[job.transform.source_patterns[0]]
    (shape,) = job.targets.values()
    if not shape:
        yield Piece(job.name, 0, source[...].to(job.dtype))
        return
    step = _rows_per_piece(shape, job.dtype)
    for first in range(0, shape[0], step):
        end = min(first + step, shape[0])
        yield Piece(job.name, first, source[first:end].to(job.dtype))


def _is_stacking(job: Job) -> bool:
    """Tell whether the job stacks one tensor per expert and changes nothing across experts."""
    merge, *rest = job.transform.operations
    counts = {len(tensors) for tensors in job.sources.values()}
    return (
        isinstance(merge, MergeModulelist)
        and merge.dim == 0
        and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)
        and len(job.targets) == 1
        and counts == {next(iter(job.targets.values()))[0]}
    )


def _run_stacking(job: Job, model: PreTrainedModel) -> Iterator[Piece]:
    ((target, shape),) = job.targets.items()
    step = _rows_per_piece(shape, job.dtype)
    for first in range(0, shape[0], step):
        sources = {
            pattern: [_reader(t, job.dtype) for t in tensors[first : first + step]]
            for pattern, tensors in job.sources.items()
        }
        yield Piece(target, first, _convert(job, sources, model)[target])


def _rows_per_piece(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    row_bytes = dtype.itemsize
    for size in shape[1:]:
        row_bytes *= size
    return max(1, PIECE_BYTES // max(1, row_bytes))
