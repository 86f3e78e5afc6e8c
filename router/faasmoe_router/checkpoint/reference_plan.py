"""Decides which of a checkpoint's tensors a store refers to instead of copying them.

A tensor is referred to where its bytes in the checkpoint are those of the model's parameter: as a
whole, or expert by expert, each in one place or as blocks of rows (gate, then up). Codes that are
kept are referred to with their scales. What is converted, combined, quantised or absent is copied,
and so is a layer that only its family's own module computes unless its tensors are stacked already.
Each copy has its reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from faasmoe_contracts.store.quantization import COMPONENT_NAMES
from faasmoe_contracts.store.referenced_files import CheckpointFile
from faasmoe_contracts.store.references import TensorReference
from faasmoe_contracts.store.tensors import CHECKPOINT_DTYPE_SIZES, DTYPE_SIZES, read_tensor_table
from faasmoe_router.checkpoint.kept_codes import KeptParameter
from faasmoe_router.checkpoint.kernel_selection import select_kernel
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.model_skeleton import ExpertsModule, ModelSkeleton
from faasmoe_transformers.weight_conversion import (
    ConversionJob,
    ConversionPlan,
    LazyTensor,
    unconverted_parts,
    why_converted,
)

MAX_PARTS = 2  # blocks of rows of one expert's parameter that a kernel reads
_BYTES_OF = {"U8": ("U8", "I8", "I32", "F8_E8M0")}
"""Dtypes that a checkpoint may have for bytes that a store reads as another."""


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor of the checkpoint lies: index of its file, offset of its first byte, form."""

    file: int
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def holds(self, tensor: LazyTensor) -> bool:
        """Return whether a tensor has the form that it has in the file, so is not decoded."""
        is_same = tensor.get_dtype() == self.dtype and tuple(tensor.get_shape()) == self.shape
        return is_same and self.dtype in DTYPE_SIZES

    def has(self, dtype: str, size: int) -> bool:
        """Return whether it can be read as so many elements of a dtype."""
        size_bytes = math.prod(self.shape) * CHECKPOINT_DTYPE_SIZES[self.dtype]
        is_readable = self.dtype in _BYTES_OF.get(dtype, (dtype,))
        return is_readable and size_bytes == size * DTYPE_SIZES[dtype]


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The files of a checkpoint and where its tensors lie in them.

    Attributes:
        root: folder that holds all files, without symbolic links.
        files: the files, their names relative to it.
        locations: where each tensor lies, by its name.
    """

    root: Path
    files: tuple[CheckpointFile, ...]
    locations: Mapping[str, TensorLocation]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> CheckpointLayout | None:
        """Read the headers of a checkpoint's files.

        Returns:
            The layout of the safetensors files; None if there are none, or if no folder but `/`
            holds them all.

        Raises:
            StoreError: a file cannot be read.
        """
        paths = [path for path in paths if path.suffix == ".safetensors"]
        if not paths:
            return None
        real_paths = [Path(os.path.realpath(path)) for path in paths]
        root = Path(os.path.commonpath([path.parent for path in real_paths]))
        if str(root) == root.anchor:
            return None
        locations: dict[str, TensorLocation] = {}
        files = []
        for index, path in enumerate(real_paths):
            table, size_bytes = read_tensor_table(path)
            files.append(CheckpointFile(path.relative_to(root).as_posix(), size_bytes))
            for name, (dtype, shape, offset) in table.items():
                locations[name] = TensorLocation(index, offset, dtype, shape)
        return cls(root, tuple(files), locations)


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """What a store refers to.

    Attributes:
        layers: references of a layer's parameters, by the experts module's name, then by the
            parameter's name in it.
        router: references of the router's tensors by name.
        copied: why each experts module or tensor of the router that is not referred to is copied,
            by name.
    """

    layers: Mapping[str, Mapping[str, TensorReference]] = field(default_factory=dict)
    router: Mapping[str, TensorReference] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that the store refers to."""
        layers = (tensor for layer in self.layers.values() for tensor in layer.values())
        return sum(tensor.size_bytes for tensor in (*layers, *self.router.values()))

    def with_used_files(
        self, files: tuple[CheckpointFile, ...]
    ) -> tuple[ReferencePlan, tuple[CheckpointFile, ...]]:
        """Return the same plan with indices into the files that it refers to, and these."""
        layers = [tensor for layer in self.layers.values() for tensor in layer.values()]
        tensors = (*layers, *self.router.values())
        used = sorted({file for tensor in tensors for file, _ in tensor.pieces})
        position = {file: index for index, file in enumerate(used)}

        def renumbered(tensor: TensorReference) -> TensorReference:
            pieces = tuple((position[file], offset) for file, offset in tensor.pieces)
            return replace(tensor, pieces=pieces)

        plan = ReferencePlan(
            {
                name: {local: renumbered(tensor) for local, tensor in layer.items()}
                for name, layer in self.layers.items()
            },
            {name: renumbered(tensor) for name, tensor in self.router.items()},
            self.copied,
        )
        return plan, tuple(files[file] for file in used)


NO_REFERENCES = ReferencePlan()


def plan_references(
    skeleton: ModelSkeleton,
    conversion: ConversionPlan,
    tensors: Mapping[str, LazyTensor],
    layout: CheckpointLayout,
    *,
    aliases: Mapping[str, str],
    names: Iterable[str],
    quantized: Iterable[str],
    kept: Mapping[str, KeptParameter],
) -> ReferencePlan:
    """Decide what a store refers to.

    Args:
        skeleton: the checkpoint's model.
        conversion: how parameters come from the checkpoint's tensors.
        tensors: the checkpoint's tensors by name.
        layout: where these lie.
        aliases: names that are stored under another name.
        names: names of all parameters to be stored.
        quantized: names of those that are stored as codes.
        kept: those of them that keep the checkpoint's codes, by name.
    """
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    references: dict[str, TensorReference | str] = {}
    for job in conversion.jobs:
        for target in job.targets:
            reference = _reference_or_reason(job, name_of, layout)
            references.setdefault(aliases.get(target, target), reference)
    references |= dict.fromkeys(quantized, "quantised")
    codes: dict[str, dict[str, TensorReference]] = {}
    for name, parameter in kept.items():
        parts = _kept_references(parameter, layout)
        if isinstance(parts, str):
            references[name] = parts
        else:
            codes[name] = parts
            references[name] = "codes, which a router reads from its own files"
    found = {name: references.get(name, "not in the checkpoint") for name in names}
    layers: dict[str, dict[str, TensorReference]] = {}
    copied: dict[str, str] = {}
    router = dict(found)
    for experts in skeleton.experts_modules:
        own: dict[str, TensorReference | str] = {}
        for local in experts.parameters:
            full = f"{experts.name}.{local}"
            stored = aliases.get(full, full)
            router.pop(stored, None)
            if stored in codes:
                own |= {local + suffix: part for suffix, part in codes[stored].items()}
            else:
                own[local] = found[stored]
        reason = next((f"{n}: {r}" for n, r in own.items() if isinstance(r, str)), "")
        layer = {name: r for name, r in own.items() if isinstance(r, TensorReference)}
        if reason := reason or _why_unreadable(experts, layer):
            copied[experts.name] = reason
        else:
            layers[experts.name] = layer
    copied |= {name: reason for name, reason in router.items() if isinstance(reason, str)}
    referred = {name: r for name, r in router.items() if isinstance(r, TensorReference)}
    return ReferencePlan(layers, referred, copied)


def require_references(skeleton: ModelSkeleton, plan: ReferencePlan) -> None:
    """Raise SourceUnsupported if an experts layer has to be copied, for StoreMode.REFERENCE."""
    for experts in skeleton.experts_modules:
        if reason := plan.copied.get(experts.name):
            raise SourceUnsupported(
                f"mode: got reference, expected auto or copy: {experts.name} must be copied: "
                f"{reason}"
            )


def _reference_or_reason(
    job: ConversionJob, name_of: Mapping[int, str], layout: CheckpointLayout
) -> TensorReference | str:
    """Return where a job's parameter lies in the checkpoint, or why it does not."""
    if reason := why_converted(job):
        return reason
    parts = unconverted_parts(job)
    ((_, shape),) = job.targets.items()
    dtype = parts[0][0].get_dtype()
    pieces = []
    for tensor in (tensor for row in parts for tensor in row):
        location = layout.locations.get(name_of.get(id(tensor), ""))
        if location is None or not location.holds(tensor):
            return "decoded"
        pieces.append((location.file, location.offset))
    if 0 in shape:
        return "empty"
    return join_pieces(TensorReference(dtype, shape, tuple(pieces)), len(parts))


def _kept_references(
    parameter: KeptParameter, layout: CheckpointLayout
) -> dict[str, TensorReference] | str:
    """Return where a parameter's codes, scales and so on lie by suffix, or why they do not."""
    references: dict[str, TensorReference] = {}
    for suffix, (dtype, matrix) in parameter.quantization.components.items():
        locations = [layout.locations.get(n) for n in parameter.sources_of(suffix) or ()]
        shape = (*parameter.leading, *matrix)
        size = math.prod(shape) // len(locations) if locations else 0
        pieces = [(x.file, x.offset) for x in locations if x is not None and x.has(dtype, size)]
        if not locations or len(pieces) != len(locations):
            scheme, part = parameter.quantization.scheme, COMPONENT_NAMES[suffix]
            return f"{scheme} {part} are not laid out as kernels read them"
        reference = TensorReference(dtype, shape, tuple(pieces))
        references[suffix] = join_pieces(reference, len(parameter.parts))
    return references


def join_pieces(reference: TensorReference, n_rows: int) -> TensorReference:
    """Return a reference of as few pieces as possible: pieces that follow each other are one."""
    for count in dict.fromkeys((1, n_rows)):
        group = len(reference.pieces) // count
        starts = reference.pieces[::group]
        expected = [
            (file, offset + i * reference.piece_bytes)
            for file, offset in starts
            for i in range(group)
        ]
        if tuple(expected) == reference.pieces:
            return TensorReference(reference.dtype, reference.shape, tuple(starts))
    return reference


def _why_unreadable(experts: ExpertsModule, layer: Mapping[str, TensorReference]) -> str:
    """Return why the functions cannot compute with these tensors as they lie; empty if they can."""
    for name, reference in layer.items():
        n_parts = len(reference.pieces) // experts.num_experts
        if len(reference.pieces) > 1 and n_parts > MAX_PARTS:
            return f"{name}: each expert lies in {n_parts} places"
        if reference.shape[:1] != (experts.num_experts,) and len(reference.pieces) > 1:
            return f"{name}: lies in {len(reference.pieces)} places"
        if n_parts > 1 and len(reference.shape) < 3:
            return f"{name}: each expert's vector lies in {n_parts} places"
    is_plain = all(
        len(reference.pieces) == 1 and reference.pieces[0][1] % DTYPE_SIZES[reference.dtype] == 0
        for reference in layer.values()
    )
    if not is_plain and select_kernel(experts) is None:
        return f"{experts.class_name} is computed by its own module, which reads stacked tensors"
    return ""
