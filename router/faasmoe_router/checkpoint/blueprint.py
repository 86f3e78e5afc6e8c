"""What is to be written: the conversion's jobs matched with the layout of the store's files."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from faasmoe_router.checkpoint.architecture import ExpertsModule, Skeleton
from faasmoe_router.checkpoint.conversion import Conversion, Job, Piece, plan_conversion
from faasmoe_router.checkpoint.errors import SourceUnsupported
from faasmoe_router.checkpoint.layout import FileLayout, TensorSpec, lay_out, lay_out_router
from faasmoe_router.checkpoint.tensors import LazyTensor
from faasmoe_router.checkpoint.tying import aliases

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The files of a store and how each tensor comes into them.

    Attributes:
        layouts: every safetensors file.
        experts_files: the file of each experts module, by the module's name; tied ones share it.
        jobs: the conversions, in the order of the files.
        initial: parameters that the checkpoint may lack, at their initial value.
        aliases: names that are stored under another name.
    """

    layouts: tuple[FileLayout, ...]
    experts_files: Mapping[str, str]
    jobs: tuple[Job, ...]
    initial: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(layout.size_bytes for layout in self.layouts)

    def placed(self, piece: Piece) -> Piece:
        """Return the piece under the name that it is stored under."""
        return replace(piece, target=self.aliases.get(piece.target, piece.target))


def draw(skeleton: Skeleton, tensors: Mapping[str, LazyTensor]) -> Blueprint:
    """Plan the store of a checkpoint.

    Raises:
        PrepareError: parameters are missing or have another shape; they are named.
    """
    conversion = plan_conversion(skeleton.model, tensors, dtype=skeleton.dtype)
    _warn_unexpected(skeleton.model, conversion)
    names = aliases(skeleton.model, conversion)
    specs = _converted(skeleton.model, conversion, names)
    initial = _initial_values(skeleton.model, specs, names)
    for name, value in initial.items():
        specs[name] = TensorSpec(name, name, value.dtype, tuple(value.shape))
    layouts, file_of = _lay_out(skeleton, specs, names)
    jobs = _in_file_order(conversion, layouts, names)
    return Blueprint(layouts, file_of, jobs, initial, names)


def _converted(
    model: PreTrainedModel, conversion: Conversion, names: Mapping[str, str]
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
            name = names.get(target, target)
            specs.setdefault(name, TensorSpec(name, name, job.dtype, shape))
    return specs


def _initial_values(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Return initial values of what the class allows to be missing; refuse all else missing."""
    missing = [name for name in model.state_dict() if names.get(name, name) not in specs]
    allowed = model._keys_to_ignore_on_load_missing or ()
    optional = [n for n in missing if any(re.search(pattern, n) for pattern in allowed)]
    required = sorted(set(missing) - set(optional))
    if required:
        more = f" and {len(required) - 5} more" if len(required) > 5 else ""
        raise SourceUnsupported(
            f"checkpoint: got no tensor for {', '.join(required[:5])}{more}, "
            f"expected every parameter of {type(model).__name__}"
        )
    return {name: _initial_value(model, name) for name in optional if name not in names}


def _initial_value(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Let the class initialise one parameter on the CPU, in a module that is otherwise on meta."""
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, local)
    value = torch.zeros(old.shape, dtype=old.dtype)
    setattr(module, local, nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value)
    with torch.no_grad():
        model._init_weights(module)
    made: torch.Tensor = getattr(module, local).detach()
    setattr(module, local, old)
    return made


def _lay_out(
    skeleton: Skeleton, specs: Mapping[str, TensorSpec], names: Mapping[str, str]
) -> tuple[tuple[FileLayout, ...], dict[str, str]]:
    """Return the files, and the file of each experts module by the module's name."""
    left = {name: specs[name] for name in skeleton.model.state_dict() if name in specs}
    layouts, file_of, owner_of = [], {}, _owners(skeleton.experts, names)
    for experts in skeleton.experts:
        owner = owner_of[experts.name]
        file_of[experts.name] = f"experts/{owner.index:05}.safetensors"
        if owner is experts:
            own = [
                replace(left.pop(f"{experts.name}.{local}"), local_name=local)
                for local in experts.parameters
            ]
            layouts.append(lay_out(file_of[experts.name], own))
    return (*lay_out_router(left.values()), *layouts), file_of


def _owners(
    modules: tuple[ExpertsModule, ...], names: Mapping[str, str]
) -> dict[str, ExpertsModule]:
    """Return for each experts module the one whose parameters it has: itself, unless it is tied."""
    by_name = {experts.name: experts for experts in modules}
    owners = {}
    for experts in modules:
        stored = {
            names.get(full, full).removesuffix(f".{local}")
            for local in experts.parameters
            for full in (f"{experts.name}.{local}",)
        }
        owner = by_name.get(stored.pop())
        if owner is None or stored:
            raise SourceUnsupported(
                f"{experts.name}: got some parameters tied to others, "
                "expected all of them or none tied to one experts module"
            )
        owners[experts.name] = owner
    return owners


def _in_file_order(
    conversion: Conversion, layouts: tuple[FileLayout, ...], names: Mapping[str, str]
) -> tuple[Job, ...]:
    """Order jobs so that few files are under construction at once; leave out those not stored."""
    place = {
        name: (i, offset) for i, file in enumerate(layouts) for name, offset in file.offsets.items()
    }
    first_of: dict[int, tuple[int, int]] = {}
    taken: set[str] = set()
    for i, job in enumerate(conversion.jobs):
        stored = {names.get(t, t) for t in job.targets} & set(place)
        if stored - taken:
            first_of[i] = min(place[name] for name in stored - taken)
        taken |= stored
    return tuple(conversion.jobs[i] for i in sorted(first_of, key=first_of.__getitem__))


def _warn_unexpected(model: PreTrainedModel, conversion: Conversion) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = [n for n in conversion.unexpected if not any(re.search(p, n) for p in ignored)]
    if names:
        _log.warning(
            "the checkpoint holds %d tensors that %s has no parameter for, the first: %s",
            len(names),
            type(model).__name__,
            ", ".join(names[:3]),
        )
