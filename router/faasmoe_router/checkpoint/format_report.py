"""Says what a store makes of the formats that a checkpoint is published in.

Codes of safetensors checkpoints and types of GGUF files alike: each tensor of a checkpoint that has
a format of its own names it, with its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from faasmoe_contracts.store.published import PublishedEntry, collapse_layers
from faasmoe_contracts.store.quantization import COMPONENT_NAMES
from faasmoe_router.checkpoint.store_plan import StorePlan, TensorSpec
from faasmoe_transformers.weight_conversion import FLOAT_DTYPES


@runtime_checkable
class FormattedTensor(Protocol):
    """A tensor of a checkpoint that has a format of its own.

    Attributes:
        format_name: the format, such as `fp8 128 x 128` or `Q8_0`.
        published_bytes: its bytes in the checkpoint, scales included.
    """

    @property
    def format_name(self) -> str:
        """The format."""

    @property
    def published_bytes(self) -> int:
        """Bytes in the checkpoint."""


@dataclass(slots=True)
class _Total:
    """Parameters of which the same is made, with their bytes in the checkpoint and the store."""

    names: list[str] = field(default_factory=list)
    published_bytes: int = 0
    stored_bytes: int = 0

    def add(self, name: str, sources: Sequence[FormattedTensor], stored_bytes: int) -> None:
        """Count a parameter."""
        self.names.append(name)
        self.published_bytes += sum(source.published_bytes for source in sources)
        self.stored_bytes += stored_bytes


def published_entries(plan: StorePlan) -> tuple[PublishedEntry, ...]:
    """Return what becomes of each format of a checkpoint's matrices, experts first."""
    stored = {spec.name: spec for layout in plan.layouts for spec in layout.tensors}
    totals: dict[tuple[str, str, str], _Total] = {}
    for job in plan.jobs:
        sources = _formatted([tensor for tensors in job.sources.values() for tensor in tensors])
        names = [name for name in job.targets if name in stored]
        if not sources or not names or len(job.targets[names[0]]) < 2:
            continue
        part = "router" if stored[names[0]].local_name == names[0] else "experts"
        formats = ", ".join(sorted({source.format_name for source in sources}))
        outcome = _outcome(plan, stored[names[0]], formats)
        total = totals.setdefault((part, formats, outcome), _Total())
        total.add(job.name, sources, sum(_stored_bytes(stored, name) for name in names))
    for name, parameter in plan.referred_codes.items():
        sources = _formatted([tensor for row in parameter.parts for tensor in row])
        formats = ", ".join(sorted({source.format_name for source in sources}))
        outcome = f"kept as {parameter.quantization.scheme}"
        size_bytes = parameter.quantization.size_bytes * math.prod(parameter.leading)
        totals.setdefault(("experts", formats, outcome), _Total()).add(name, sources, size_bytes)
    return tuple(
        PublishedEntry(
            *key,
            weights=collapse_layers(total.names),
            count=len(total.names),
            published_bytes=total.published_bytes,
            stored_bytes=total.stored_bytes,
        )
        for key, total in sorted(totals.items())
    )


def _formatted(tensors: Sequence[object]) -> list[FormattedTensor]:
    return [tensor for tensor in tensors if isinstance(tensor, FormattedTensor)]


def _stored_bytes(stored: Mapping[str, TensorSpec], name: str) -> int:
    parts = (stored.get(name + suffix) for suffix in COMPONENT_NAMES)
    return sum(part.size_bytes for part in parts if part is not None)


def _outcome(plan: StorePlan, spec: TensorSpec, formats: str) -> str:
    """Return what becomes of a parameter."""
    is_float = formats in FLOAT_DTYPES
    if spec.name in plan.kept:
        return f"kept as {plan.kept[spec.name].quantization.scheme}"
    if spec.name in plan.quantization:
        again = "" if is_float else " again"
        return f"quantised{again} as {plan.quantization[spec.name].scheme} (lossy)"
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"stored as {dtype}" if is_float else f"dequantised to {dtype}"
