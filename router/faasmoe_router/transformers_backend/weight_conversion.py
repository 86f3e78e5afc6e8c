"""The checkpoint's tensors, opened but not read.

Bytes are read with `pread` and not mapped, so that what has been converted leaves memory at once.

From the checkpoint's tensors to the model's parameters, one parameter at a time.

The rules are transformers' own (renamings and weight converters); the loop of
`convert_and_load_state_dict_in_model` is repeated here because that one keeps every tensor in a
model. Each job is first run on the meta device, which tells its targets without reading a byte.

Parameters with two names: each is stored once, under one of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
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

from faasmoe_router.errors import PrepareError, SourceUnsupported

logger = logging.getLogger(__name__)


FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class LazyTensor(Protocol):
    """A tensor of a checkpoint that is read when it is indexed."""

    def get_shape(self) -> list[int]:
        """Return its shape."""

    def get_dtype(self) -> str:
        """Return its dtype as safetensors spells it."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read the indexed part."""


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[dict[str, LazyTensor]]:
    """Open every tensor of `files` by name; raises PrepareError that names a broken file."""
    with ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                tensors.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise PrepareError(f"{path}: got no readable safetensors file: {error}") from error
        yield tensors


def first_float_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype of the first floating tensor, as transformers guesses a missing dtype."""
    for tensor in tensors.values():
        if tensor.get_dtype() in FLOAT_DTYPES:
            return FLOAT_DTYPES[tensor.get_dtype()]
    raise SourceUnsupported("checkpoint: got no floating tensor, expected weights")


SLICE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Some rows (dimension 0) of one parameter, from `first_row` on."""

    target: str
    first_row: int
    tensor: torch.Tensor


@dataclass(slots=True)
class ConversionJob:
    """One transform, the checkpoint tensors that it takes and the parameters that it gives."""

    name: str
    transform: Any
    dtype: torch.dtype
    sources: dict[str, list[LazyTensor]] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """All jobs of a checkpoint, and its tensors that the model has no parameter for."""

    jobs: tuple[ConversionJob, ...]
    unexpected: tuple[str, ...]


def plan_conversion(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> ConversionPlan:
    """Match every tensor of the checkpoint to parameters of the meta `model`."""
    conversion_mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversion_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversion_mapping if isinstance(entry, WeightConverter)]
    converter_by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = model.state_dict()
    dtypes = _ParameterDtypes(model, dtype)
    jobs: dict[str, ConversionJob] = {}
    unexpected: list[str] = []
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = _target_name(key, renamings, converters, model, expected)
        if name not in expected:
            unexpected.append(key)
            continue
        converter = WeightRenaming(key, name) if pattern is None else converter_by_pattern[pattern]
        job = jobs.setdefault(
            name, ConversionJob(name, converter, dtypes.dtype_of(name, expected[name]))
        )
        _reject_quantized(key, tensors[key], job.dtype)
        if pattern is None and job.sources:
            raise SourceUnsupported(
                f"{name}: got tensors {', '.join((*job.sources, key))} for it, expected one"
            )
        job.sources.setdefault(pattern or key, []).append(tensors[key])
    for job in jobs.values():
        _dry_run(job, model)
    return ConversionPlan(tuple(jobs.values()), tuple(unexpected))


def run_conversion(job: ConversionJob, model: PreTrainedModel) -> Iterator[ParameterSlice]:
    """Read the job's tensors and give its parameters, in pieces where rows are independent."""
    if isinstance(job.transform, WeightRenaming):
        yield from _run_renaming(job)
    elif _is_expert_stacking(job):
        yield from _run_expert_stacking(job, model)
    else:
        sources = {
            pattern: [_lazy_reader(t, job.dtype) for t in ts] for pattern, ts in job.sources.items()
        }
        for target, tensor in _convert(job, sources, model).items():
            yield ParameterSlice(target, 0, tensor)


class _ParameterDtypes:
    """The dtype that from_pretrained would give each parameter."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._dtype_plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(pattern.replace("*", ".*")), kept)
            for pattern, kept in model._get_dtype_plan(dtype).items()
        ]

    def dtype_of(self, name: str, parameter: torch.Tensor) -> torch.dtype:
        """Return the dtype of the parameter `name`."""
        for pattern, planned_dtype in self._dtype_plan:
            if pattern.search(name):
                return planned_dtype
        return parameter.dtype


def _target_name(
    key: str, renamings: list[Any], converters: list[Any], model: PreTrainedModel, expected: Any
) -> tuple[str, str | None]:
    prefix = model.base_model_prefix
    renamed: tuple[str, str | None] = rename_source_key(
        key, renamings, converters, prefix, expected
    )
    if renamed[0] not in expected and key in expected:
        return rename_source_key(key, [], [], prefix, expected)  # type: ignore[no-any-return]
    return renamed


def _reject_quantized(key: str, tensor: LazyTensor, dtype: torch.dtype) -> None:
    """Refuse codes in place of weights: read as numbers, without their scales, they are noise."""
    if dtype.is_floating_point and tensor.get_dtype() not in FLOAT_DTYPES:
        raise SourceUnsupported(
            f"{key}: got dtype {tensor.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}: "
            "quantised weights are not served"
        )


def _dry_run(job: ConversionJob, model: PreTrainedModel) -> None:
    """Convert on the meta device: fills the job's targets with names and shapes."""
    sources = {
        pattern: [torch.empty(t.get_shape(), dtype=job.dtype, device="meta") for t in ts]
        for pattern, ts in job.sources.items()
    }
    try:
        converted = _convert(job, sources, model)
    except Exception as error:
        names = ", ".join(sorted(job.sources))
        raise SourceUnsupported(f"{job.name}: cannot be converted from {names}: {error}") from error
    job.targets = {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _convert(
    job: ConversionJob, sources: Mapping[str, list[Any]], model: Any
) -> dict[str, torch.Tensor]:
    transform = deepcopy(job.transform)
    for pattern, tensors in sources.items():
        transform.collected_tensors[pattern] = tensors
    converted = transform.convert(job.name, model=model, config=model.config)
    return {
        name: value[0] if isinstance(value, list) else value for name, value in converted.items()
    }


def _lazy_reader(tensor: LazyTensor, dtype: torch.dtype) -> Any:
    return lambda: tensor[...].to(dtype)


def _run_renaming(job: ConversionJob) -> Iterator[ParameterSlice]:
    """Copy a parameter that only changes its name, by rows."""
    (source, *_) = job.sources[job.transform.source_patterns[0]]
    (shape,) = job.targets.values()
    if not shape:
        yield ParameterSlice(job.name, 0, source[...].to(job.dtype))
        return
    n_rows = _rows_per_slice(shape, job.dtype)
    for first_row in range(0, shape[0], n_rows):
        end_row = min(first_row + n_rows, shape[0])
        yield ParameterSlice(job.name, first_row, source[first_row:end_row].to(job.dtype))


def _is_expert_stacking(job: ConversionJob) -> bool:
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


def _run_expert_stacking(job: ConversionJob, model: PreTrainedModel) -> Iterator[ParameterSlice]:
    ((target, shape),) = job.targets.items()
    n_rows = _rows_per_slice(shape, job.dtype)
    for first_row in range(0, shape[0], n_rows):
        sources = {
            pattern: [_lazy_reader(t, job.dtype) for t in tensors[first_row : first_row + n_rows]]
            for pattern, tensors in job.sources.items()
        }
        yield ParameterSlice(target, first_row, _convert(job, sources, model)[target])


def _rows_per_slice(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    row_bytes = dtype.itemsize
    for size in shape[1:]:
        row_bytes *= size
    return max(1, SLICE_BYTES // max(1, row_bytes))


def find_aliases(model: PreTrainedModel, conversion: ConversionPlan) -> dict[str, str]:
    """Return the names that are not stored, each with the name that stands for it.

    Names are tied by the model's class (`all_tied_weights_keys`) or because modules are shared. As
    in transformers, names that the class ties but the checkpoint gives different values stay apart.
    """
    job_by_parameter = {name: job for job in conversion.jobs for name in job.targets}
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in job_by_parameter
            and source in job_by_parameter
            and not _are_equal(target, source, job_by_parameter, model)
        ):
            logger.warning("%s and %s are tied by the class but differ: both kept", target, source)
        else:
            tied[target] = source
    return _shared_parameters(model) | tied


def _shared_parameters(model: PreTrainedModel) -> dict[str, str]:
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored_name = first_name.setdefault(id(tensor), name)
        if stored_name != name:
            aliases[name] = stored_name
    return aliases


def _are_equal(
    left: str, right: str, job_by_parameter: Mapping[str, ConversionJob], model: PreTrainedModel
) -> bool:
    """Compare two parameters piece by piece."""
    if job_by_parameter[left].targets[left] != job_by_parameter[right].targets[right]:
        return False
    slices = zip(
        run_conversion(job_by_parameter[left], model),
        run_conversion(job_by_parameter[right], model),
        strict=True,
    )
    return all(torch.equal(a.tensor, b.tensor) for a, b in slices)
