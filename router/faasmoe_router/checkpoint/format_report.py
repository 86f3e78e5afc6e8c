"""Says what a store makes of the codes that a checkpoint is published with, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from faasmoe_contracts.store.quantization import SCALE_SUFFIX
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
    stored = {spec.name: spec for layout in plan.layouts for spec in layout.tensors}
    totals: dict[tuple[str, str, str], _Total] = {}
    for job in plan.jobs:
        sources = [tensor for tensors in job.sources.values() for tensor in tensors]
        weights = [tensor for tensor in sources if isinstance(tensor, CodedWeight)]
        names = [name for name in job.targets if name in stored]
        if not weights or not names:
            continue
        is_expert = stored[names[0]].local_name != names[0]
        formats = ", ".join(sorted({weight.format_name for weight in weights}))
        dtype = str(stored[names[0]].dtype).removeprefix("torch.")
        key = "experts" if is_expert else "router", formats, _outcome(plan, names[0], dtype)
        total = totals.setdefault(key, _Total())
        total.count += 1
        total.published_bytes += sum(weight.published_bytes for weight in weights)
        parts = (stored.get(n) for name in names for n in (name, name + SCALE_SUFFIX))
        total.stored_bytes += sum(spec.size_bytes for spec in parts if spec is not None)
    for (part, formats, outcome), total in sorted(totals.items()):
        published, kept = total.published_bytes / _GB, total.stored_bytes / _GB
        yield (
            f"{part}: {total.count} weights in {formats} are {outcome}: {kept:.3g} GB, "
            f"{kept / published:.2f} times the {published:.3g} GB of the checkpoint"
        )


def _outcome(plan: StorePlan, name: str, dtype: str) -> str:
    if name in plan.kept:
        return f"kept as {plan.kept[name].quantization.scheme}"
    if name in plan.quantization:
        return f"quantised again as {plan.quantization[name].scheme} (lossy)"
    return f"dequantised to {dtype}"
