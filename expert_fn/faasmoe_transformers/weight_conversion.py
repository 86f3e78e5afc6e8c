"""Converts a checkpoint's tensors to the model's parameters, one parameter at a time.

The rules are transformers' own (renamings and weight converters). The loop of its
`convert_and_load_state_dict_in_model` is repeated here because that one materializes every tensor
in a model. Each job is first run on the meta device, which yields its parameters and their shapes
without reading a byte. Parameters that have two names are found, so that each is stored once.

Tensors are read through LazyTensor, so this module knows no file format.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

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

from faasmoe_transformers.dtypes import ParameterDtypes
from faasmoe_transformers.errors import UnsupportedModel

logger = logging.getLogger(__name__)

SLICE_BYTES = 16 << 20
"""Size to which the pieces of a parameter are limited if its rows can be converted separately."""

FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Floating dtypes of checkpoints by their names in safetensors."""


class LazyTensor(Protocol):
    """A tensor of a checkpoint that is read when it is indexed."""

    def get_shape(self) -> list[int]:
        """Return its shape."""

    def get_dtype(self) -> str:
        """Return the name of its dtype in safetensors, such as `BF16`."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read the indexed part."""


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Some rows (dimension 0) of one parameter.

    Attributes:
        target: name of the parameter in the model.
        first_row: index of the first row.
        tensor: the rows, in the parameter's dtype; the whole parameter if it has no dimension.
    """

    target: str
    first_row: int
    tensor: torch.Tensor


@dataclass(slots=True)
class ConversionJob:
    """One transform with its input tensors and output parameters.

    Attributes:
        name: name of the parameter that the transform is planned for.
        transform: transformers' WeightRenaming or WeightConverter.
        dtype: dtype of the parameters.
        sources: the checkpoint's tensors by the transform's source pattern.
        targets: shapes of the parameters by name.
    """

    name: str
    transform: Any
    dtype: torch.dtype
    sources: dict[str, list[LazyTensor]] = field(default_factory=dict)
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def renamed_tensor(self) -> LazyTensor | None:
        """Return the tensor that the job only renames; None if it does anything else."""
        tensors = [tensor for tensors in self.sources.values() for tensor in tensors]
        has_operations = bool(getattr(self.transform, "operations", None))
        return tensors[0] if len(tensors) == 1 and not has_operations else None


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The conversion of a checkpoint.

    Attributes:
        jobs: the jobs, in the natural order of the checkpoint's tensor names.
        unexpected: the checkpoint's tensors for which the model has no parameter.
    """

    jobs: tuple[ConversionJob, ...]
    unexpected: tuple[str, ...]


def plan_conversion(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> ConversionPlan:
    """Match every tensor of a checkpoint to parameters of the model.

    Args:
        model: the model on the meta device.
        tensors: the checkpoint's tensors by name.
        dtype: the model's dtype.

    Raises:
        UnsupportedModel: a tensor is quantized, two tensors map to one parameter, or tensors cannot
            be converted; the message names them.
    """
    conversion_mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversion_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversion_mapping if isinstance(entry, WeightConverter)]
    converter_by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = model.state_dict()
    dtypes = ParameterDtypes(model, dtype)
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
            raise UnsupportedModel(
                f"{name}: got tensors {', '.join((*job.sources, key))} for it, expected one"
            )
        job.sources.setdefault(pattern or key, []).append(tensors[key])
    for job in jobs.values():
        _dry_run(job, model)
    return ConversionPlan(tuple(jobs.values()), tuple(unexpected))


def run_conversion(job: ConversionJob, model: PreTrainedModel) -> Iterator[ParameterSlice]:
    """Read a job's tensors and yield its parameters, in slices where rows are independent."""
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


def why_converted(job: ConversionJob) -> str:
    """Return why the bytes of a job's parameter are not those of its tensors; empty if they are.

    They are where the job only renames a tensor, or stacks one or several tensors per expert as
    blocks of equal size of the expert's rows.
    """
    dtypes = {tensor.get_dtype() for tensors in job.sources.values() for tensor in tensors}
    if other := sorted(name for name in dtypes if FLOAT_DTYPES.get(name) is not job.dtype):
        return f"converted from {other[0]} to {str(job.dtype).removeprefix('torch.')}"
    if isinstance(job.transform, WeightRenaming):
        return ""
    is_stacking = _is_expert_stacking(job) and all(
        isinstance(operation, MergeModulelist) or operation.dim == 1
        for operation in job.transform.operations
    )
    shapes = {tuple(t.get_shape()) for tensors in job.sources.values() for t in tensors}
    if not is_stacking or len(shapes) != 1 or len(job.transform.operations) > 2:
        return f"combined from {', '.join(sorted(job.sources))}"
    return ""


def unconverted_parts(job: ConversionJob) -> list[tuple[LazyTensor, ...]]:
    """Return the tensors whose bytes are those of a job's parameter, see `why_converted`.

    One tuple for each index of dimension 0 that has tensors of its own, else one for all.
    """
    patterns = [p for p in job.transform.source_patterns if p in job.sources]
    return list(zip(*(job.sources[pattern] for pattern in patterns), strict=True))


def moves_rows_only(job: ConversionJob) -> bool:
    """Return whether a job makes one parameter and moves whole rows of its sources only.

    Then the codes of rows, or their scales, can be converted as the weights would be.
    """
    if isinstance(job.transform, WeightRenaming):
        return len(job.targets) == 1
    # Dimension 1 of the stack [E, N, K] has the rows of each expert.
    _, *rest = job.transform.operations
    return _is_expert_stacking(job) and all(operation.dim == 1 for operation in rest)


def first_float_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype of the first floating tensor, as transformers infers a missing dtype.

    Raises:
        UnsupportedModel: there is no floating tensor.
    """
    for tensor in tensors.values():
        if tensor.get_dtype() in FLOAT_DTYPES:
            return FLOAT_DTYPES[tensor.get_dtype()]
    raise UnsupportedModel("checkpoint: got no floating tensor, expected weights")


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
    """Reject quantized weights: their codes mean nothing without the scales."""
    if dtype.is_floating_point and tensor.get_dtype() not in FLOAT_DTYPES:
        raise UnsupportedModel(
            f"{key}: got dtype {tensor.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}: "
            "quantised weights are not served"
        )


def _dry_run(job: ConversionJob, model: PreTrainedModel) -> None:
    """Convert on the meta device, which fills in the job's targets."""
    sources = {
        pattern: [torch.empty(t.get_shape(), dtype=job.dtype, device="meta") for t in ts]
        for pattern, ts in job.sources.items()
    }
    try:
        converted = _convert(job, sources, model)
    except Exception as error:
        names = ", ".join(sorted(job.sources))
        raise UnsupportedModel(f"{job.name}: cannot be converted from {names}: {error}") from error
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
    """Copy a parameter that only changes its name, in slices of rows."""
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
    """Tell whether the job stacks one tensor per expert without mixing experts."""
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
    """Return the parameter names that are not stored, each with the stored name it stands for.

    Names are tied by the model's class or because modules are shared. As in transformers, names
    that the class ties but that have different values in the checkpoint are both stored.
    """
    job_by_parameter = {name: job for job in conversion.jobs for name in job.targets}
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in job_by_parameter
            and source in job_by_parameter
            and not _are_equal(target, source, job_by_parameter, model)
        ):
            logger.warning(
                "%s and %s are tied by the class but differ: both are stored", target, source
            )
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
    """Compare two parameters slice by slice."""
    if job_by_parameter[left].targets[left] != job_by_parameter[right].targets[right]:
        return False
    slices = zip(
        run_conversion(job_by_parameter[left], model),
        run_conversion(job_by_parameter[right], model),
        strict=True,
    )
    return all(torch.equal(a.tensor, b.tensor) for a, b in slices)
