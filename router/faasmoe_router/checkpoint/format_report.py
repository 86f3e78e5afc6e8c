"""Says what a store makes of the codes that a checkpoint is published with, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from faasmoe_contracts.store.quantization import COMPONENT_NAMES
from faasmoe_router.checkpoint.formats.coded_weight import CodedWeight
from faasmoe_router.checkpoint.store_plan import StorePlan

_GB = 1e9


@dataclass(slots=True)
class _Total:
    """Parameters of which the same is made, with their bytes in the checkpoint and the store."""

    count: int = 0
    published_bytes: int = 0
    stored_bytes: int = 0


def describe_published(plan: StorePlan) -> Iterator[str]:
    """Yield a line for each kind of codes in a checkpoint and what becomes of it."""
    totals: dict[tuple[str, str, str], _Total] = {}
    stored = {spec.name: spec for layout in plan.layouts for spec in layout.tensors}
    for job in plan.jobs:
        sources = [tensor for tensors in job.sources.values() for tensor in tensors]
        names = [name for name in job.targets if name in stored]
        if names:
            is_expert = stored[names[0]].local_name != names[0]
            dtype = str(stored[names[0]].dtype).removeprefix("torch.")
            parts = [stored.get(name + suffix) for name in names for suffix in COMPONENT_NAMES]
            size_bytes = sum(spec.size_bytes for spec in parts if spec is not None)
            _add(totals, sources, _outcome(plan, names[0], dtype), size_bytes, is_expert=is_expert)
    for parameter in plan.referred_codes.values():
        sources = [tensor for row in parameter.parts for tensor in row]
        outcome = f"kept as {parameter.quantization.scheme} where they lie"
        _add(totals, sources, outcome, 0, is_expert=True)
    for (part, formats, outcome), total in sorted(totals.items()):
        published, kept = total.published_bytes / _GB, total.stored_bytes / _GB
        yield (
            f"{part}: {total.count} weights in {formats} are {outcome}: {kept:.3g} GB, "
            f"{kept / published:.2f} times the {published:.3g} GB of the checkpoint"
        )


def _add(
    totals: dict[tuple[str, str, str], _Total],
    sources: Sequence[object],
    outcome: str,
    stored_bytes: int,
    *,
    is_expert: bool,
) -> None:
    """Count one parameter, if coded weights are among its sources."""
    weights = [tensor for tensor in sources if isinstance(tensor, CodedWeight)]
    if not weights:
        return
    formats = ", ".join(sorted({weight.format_name for weight in weights}))
    key = "experts" if is_expert else "router", formats, outcome
    total = totals.setdefault(key, _Total())
    total.count += 1
    total.published_bytes += sum(weight.published_bytes for weight in weights)
    total.stored_bytes += stored_bytes


def _outcome(plan: StorePlan, name: str, dtype: str) -> str:
    if name in plan.kept:
        return f"kept as {plan.kept[name].quantization.scheme}"
    if name in plan.quantization:
        return f"quantised again as {plan.quantization[name].scheme} (lossy)"
    return f"dequantised to {dtype}"
