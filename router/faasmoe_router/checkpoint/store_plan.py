"""Plans a store before a byte is written: its tensor files and the conversions that fill them.

Every safetensors file is laid out with its header, its size and the offset of each tensor; the jobs
of the conversion are matched with these places and ordered so that few files are under
construction at once.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_router.checkpoint.kept_codes import KeptParameter, plan_kept_codes
from faasmoe_router.checkpoint.model_source import unsupported_source
from faasmoe_router.checkpoint.quantization_plan import plan_quantization
from faasmoe_router.checkpoint.reference_plan import (
    NO_REFERENCES,
    CheckpointLayout,
    ReferencePlan,
    plan_references,
)
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.model_skeleton import (
    ExpertsModule,
    ModelSkeleton,
    ignored_tensor_patterns,
    initial_value,
    optional_parameter_patterns,
)
from faasmoe_transformers.weight_conversion import (
    ConversionJob,
    ConversionPlan,
    LazyTensor,
    ParameterSlice,
    find_aliases,
    plan_conversion,
    run_conversion,
)

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
ROUTER_SHARD_BYTES = 2 << 30
SAFETENSORS_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be stored.

    Attributes:
        name: its name in the model.
        local_name: its name in the file.
        dtype: its dtype.
        shape: its shape.
    """

    name: str
    local_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One safetensors file.

    Attributes:
        name: path within the store.
        header: the file's header, padded to ALIGNMENT bytes.
        size_bytes: size of the file.
        offsets: offset of each tensor in the file, by name in the model.
        tensors: the tensors in the order of their offsets.
    """

    name: str
    header: bytes
    size_bytes: int
    offsets: Mapping[str, int]
    tensors: tuple[TensorSpec, ...]


def plan_file(name: str, tensors: Iterable[TensorSpec]) -> FileLayout:
    """Lay out one file: widest dtype first, so that each tensor is aligned to its own dtype."""
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.local_name))
    entries: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size_bytes
        starts[tensor.name] = start
        entries[tensor.local_name] = {
            "dtype": SAFETENSORS_DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = _safetensors_header(entries)
    offsets = {tensor_name: len(header) + begin for tensor_name, begin in starts.items()}
    return FileLayout(name, header, len(header) + end, offsets, tuple(ordered))


def plan_router_files(
    tensors: Iterable[TensorSpec], *, shard_bytes: int = ROUTER_SHARD_BYTES
) -> list[FileLayout]:
    """Lay out the router's tensors in files of at most `shard_bytes`, in their order.

    The scales of a weight follow its codes and go into the same file.
    """
    shards: list[list[TensorSpec]] = []
    remaining_bytes = 0
    for tensor in tensors:
        is_new = tensor.size_bytes > remaining_bytes and not _is_scale_of(tensor, shards)
        if not shards or is_new:
            shards.append([])
            remaining_bytes = shard_bytes
        shards[-1].append(tensor)
        remaining_bytes -= tensor.size_bytes
    names = (f"router/model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 100_000))
    return [plan_file(name, shard) for name, shard in zip(names, shards, strict=False)]


def _is_scale_of(tensor: TensorSpec, shards: Sequence[Sequence[TensorSpec]]) -> bool:
    """Return whether a tensor has the scales of the codes before it."""
    return bool(shards) and tensor.name == shards[-1][-1].name + SCALE_SUFFIX


def _safetensors_header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True, slots=True)
class StorePlan:
    """The files of a store and how each tensor comes into them.

    Attributes:
        layouts: every safetensors file.
        file_by_experts_module: file of each experts module by its name; tied modules share one,
            and one whose tensors are not copied has none (empty).
        jobs: the conversions in the order of the files.
        initial_values: initial values of parameters that the checkpoint lacks and may lack.
        aliases: names that are stored under another name, each with that name.
        quantization: how each parameter that is to be quantised is stored, by its name in the
            model.
        kept: parameters that keep the checkpoint's codes, by name.
        references: what the store refers to in the checkpoint.
    """

    layouts: tuple[FileLayout, ...]
    file_by_experts_module: Mapping[str, str]
    jobs: tuple[ConversionJob, ...]
    initial_values: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    quantization: Mapping[str, TensorQuantization]
    kept: Mapping[str, KeptParameter]
    references: ReferencePlan = NO_REFERENCES

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(layout.size_bytes for layout in self.layouts)

    @property
    def referred_codes(self) -> dict[str, KeptParameter]:
        """The parameters whose codes the store refers to, by name."""
        stored = {name for layout in self.layouts for name in layout.offsets}
        return {name: kept for name, kept in self.kept.items() if name not in stored}

    def slices(self, job: ConversionJob, model: PreTrainedModel) -> Iterator[ParameterSlice]:
        """Run a job; yield what it gives under the names that it is stored under.

        Parameters that keep the checkpoint's codes come as codes, scales and so on.
        """
        kept = self.kept.get(job.name)
        for piece in run_conversion(job, model) if kept is None else kept.slices():
            yield replace(piece, target=self.aliases.get(piece.target, piece.target))


def plan_store(
    skeleton: ModelSkeleton,
    tensors: Mapping[str, LazyTensor],
    quantization: QuantizationEntry = QuantizationEntry(),  # noqa: B008
    layout: CheckpointLayout | None = None,
) -> StorePlan:
    """Plan the store of a checkpoint.

    Args:
        skeleton: the checkpoint's model.
        tensors: the checkpoint's tensors by name.
        quantization: what to quantise.
        layout: where the tensors lie, to refer to them; None to copy all.

    Raises:
        SourceUnsupported: tensors cannot be converted, or parameters are missing or have another
            shape; the message names them.
    """
    with unsupported_source():
        conversion = plan_conversion(skeleton.model, tensors, dtype=skeleton.dtype)
    _warn_unexpected(skeleton.model, conversion)
    aliases = find_aliases(skeleton.model, conversion)
    specs = _converted_specs(skeleton.model, conversion, aliases)
    initial_values = _initial_values(skeleton.model, specs, aliases)
    for name, value in initial_values.items():
        specs[name] = TensorSpec(name, name, value.dtype, tuple(value.shape))
    shared = {*aliases, *aliases.values()}
    quantized = plan_quantization(
        skeleton,
        quantization,
        unquantizable={*initial_values, *shared},
        shapes={name: spec.shape for name, spec in specs.items()},
    )
    kept = plan_kept_codes(skeleton, conversion.jobs, quantization, quantized, shared=shared)
    quantized = {name: entry for name, entry in quantized.items() if name not in kept}
    codes = quantized | {name: parameter.quantization for name, parameter in kept.items()}
    references = NO_REFERENCES
    if layout is not None:
        references = plan_references(
            skeleton,
            conversion,
            tensors,
            layout,
            aliases=aliases,
            names=specs,
            quantized=codes,
            kept=kept,
        )
    layouts, files = _plan_files(skeleton, specs, aliases, codes, references)
    jobs = _sort_jobs_by_file(conversion, layouts, aliases)
    return StorePlan(layouts, files, jobs, initial_values, aliases, quantized, kept, references)


def _converted_specs(
    model: PreTrainedModel, conversion: ConversionPlan, aliases: Mapping[str, str]
) -> dict[str, TensorSpec]:
    expected = model.state_dict()
    specs: dict[str, TensorSpec] = {}
    for job in conversion.jobs:
        for target, shape in job.targets.items():
            if target not in expected:
                continue
            if shape != tuple(expected[target].shape):
                raise SourceUnsupported(
                    f"{target}: got shape {list(shape)}, expected {list(expected[target].shape)}"
                )
            name = aliases.get(target, target)
            specs.setdefault(name, TensorSpec(name, name, job.dtype, shape))
    return specs


def _initial_values(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Return initial values of missing parameters; raises if a required one is missing."""
    missing = [name for name in model.state_dict() if aliases.get(name, name) not in specs]
    patterns = optional_parameter_patterns(model)
    optional = [n for n in missing if any(re.search(pattern, n) for pattern in patterns)]
    required = sorted(set(missing) - set(optional))
    if required:
        more = f" and {len(required) - 5} more" if len(required) > 5 else ""
        raise SourceUnsupported(
            f"checkpoint: got no tensor for {', '.join(required[:5])}{more}, "
            f"expected every parameter of {type(model).__name__}"
        )
    return {name: initial_value(model, name) for name in optional if name not in aliases}


def quantized_specs(spec: TensorSpec, quantization: TensorQuantization) -> list[TensorSpec]:
    """Return the codes, scales and so on that a parameter is stored as."""
    leading = spec.shape[:-2]
    return [
        TensorSpec(
            spec.name + suffix, spec.local_name + suffix, TORCH_DTYPES[dtype], (*leading, *matrix)
        )
        for suffix, (dtype, matrix) in quantization.components.items()
    ]


def _plan_files(
    skeleton: ModelSkeleton,
    specs: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    quantized: Mapping[str, TensorQuantization],
    references: ReferencePlan,
) -> tuple[tuple[FileLayout, ...], dict[str, str]]:
    """Return the files of what is copied, and the file of each experts module by its name."""
    remaining = {name: specs[name] for name in skeleton.model.state_dict() if name in specs}
    owners = _parameter_owners(skeleton.experts_modules, aliases)
    layouts: list[FileLayout] = []
    file_by_experts_module: dict[str, str] = {}
    for experts in skeleton.experts_modules:
        owner = owners[experts.name]
        if experts.name in references.layers:
            file_by_experts_module[experts.name] = ""
            for local in experts.parameters:
                remaining.pop(f"{experts.name}.{local}", None)
            continue
        file_by_experts_module[experts.name] = f"experts/{owner.index:05}.safetensors"
        if owner is experts:
            own_specs = [
                replace(remaining.pop(f"{experts.name}.{local}"), local_name=local)
                for local in experts.parameters
            ]
            own_specs = _with_quantized(own_specs, quantized)
            layouts.append(plan_file(file_by_experts_module[experts.name], own_specs))
    copied = [spec for name, spec in remaining.items() if name not in references.router]
    router_specs = _with_quantized(copied, quantized)
    return (*plan_router_files(router_specs), *layouts), file_by_experts_module


def _with_quantized(
    specs: Iterable[TensorSpec], quantized: Mapping[str, TensorQuantization]
) -> list[TensorSpec]:
    """Return the specs with codes and scales in the place of quantised parameters."""
    stored: list[TensorSpec] = []
    for spec in specs:
        quantization = quantized.get(spec.name)
        stored += [spec] if quantization is None else quantized_specs(spec, quantization)
    return stored


def _parameter_owners(
    modules: tuple[ExpertsModule, ...], aliases: Mapping[str, str]
) -> dict[str, ExpertsModule]:
    """Return for each experts module the one that owns its parameters: itself, unless tied."""
    by_name = {experts.name: experts for experts in modules}
    owners = {}
    for experts in modules:
        stored_modules = {
            aliases.get(full, full).removesuffix(f".{local}")
            for local in experts.parameters
            for full in (f"{experts.name}.{local}",)
        }
        owner = by_name.get(stored_modules.pop())
        if owner is None or stored_modules:
            raise SourceUnsupported(
                f"{experts.name}: got some parameters tied to others, "
                "expected all of them or none tied to one experts module"
            )
        owners[experts.name] = owner
    return owners


def _sort_jobs_by_file(
    conversion: ConversionPlan, layouts: tuple[FileLayout, ...], aliases: Mapping[str, str]
) -> tuple[ConversionJob, ...]:
    """Order jobs so that few files are open at once; drop jobs whose results are not stored."""
    position = {
        name: (i, offset) for i, file in enumerate(layouts) for name, offset in file.offsets.items()
    }
    first_position: dict[int, tuple[int, int]] = {}
    planned: set[str] = set()
    for i, job in enumerate(conversion.jobs):
        stored = {aliases.get(t, t) for t in job.targets} & set(position)
        if stored - planned:
            first_position[i] = min(position[name] for name in stored - planned)
        planned |= stored
    return tuple(conversion.jobs[i] for i in sorted(first_position, key=first_position.__getitem__))


def _warn_unexpected(model: PreTrainedModel, conversion: ConversionPlan) -> None:
    patterns = ignored_tensor_patterns(model)
    names = [n for n in conversion.unexpected if not any(re.search(p, n) for p in patterns)]
    if names:
        logger.warning(
            "the checkpoint holds %d tensors that %s has no parameter for, the first: %s",
            len(names),
            type(model).__name__,
            ", ".join(names[:3]),
        )
