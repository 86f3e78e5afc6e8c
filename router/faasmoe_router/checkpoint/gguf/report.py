"""Says what a store makes of a GGUF file's types, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_router.checkpoint.gguf.tensors import ExpertStack, GgufTensor
from faasmoe_router.checkpoint.store_plan import StorePlan
from faasmoe_transformers.weight_conversion import ConversionJob

_GB = 1e9


@dataclass(slots=True)
class _Total:
    """Weights of which the same is made, with their bytes in the file and in the store."""

    count: int = 0
    file_bytes: int = 0
    stored_bytes: int = 0


def describe_types(plan: StorePlan) -> Iterator[str]:
    """Yield a line for each type of matrices and what becomes of it, experts first."""
    sizes = {spec.name: spec.size_bytes for layout in plan.layouts for spec in layout.tensors}
    dtypes = {spec.name: spec.dtype for layout in plan.layouts for spec in layout.tensors}
    totals: dict[tuple[bool, str, str], _Total] = {}
    for job in plan.jobs:
        source = _file_tensor(job)
        if source is None or job.name not in sizes or len(source.get_shape()) < 2:
            continue
        types = "/".join(dict.fromkeys(part.type.name for part in source.parts))
        dtype = str(dtypes[job.name]).removeprefix("torch.")
        key = not isinstance(source, ExpertStack), types, _action(plan, job.name, types, dtype)
        total = totals.setdefault(key, _Total())
        total.count += 1
        total.file_bytes += sum(part.info.size_bytes for part in source.parts)
        total.stored_bytes += sizes[job.name] + sizes.get(job.name + SCALE_SUFFIX, 0)
    for (is_router, types, action), total in sorted(totals.items()):
        part = "router" if is_router else "experts"
        cost = f"{total.stored_bytes / _GB:.3g} GB"
        if total.stored_bytes != total.file_bytes:
            factor = total.stored_bytes / total.file_bytes
            cost += f", {factor:.2f} times the {total.file_bytes / _GB:.3g} GB of the file"
        yield f"{part}: {total.count} weights of {types} {action}: {cost}"


def _action(plan: StorePlan, name: str, types: str, dtype: str) -> str:
    """Return what becomes of a parameter."""
    if name in plan.published:
        return f"are kept as {plan.quantization[name].scheme}"
    if name in plan.quantization:
        return f"are quantised anew to {plan.quantization[name].scheme} (lossy)"
    is_float = types.lower() in ("bf16", "f16", "f32")
    return f"{'are stored' if is_float else 'are decoded'} as {dtype}"


def _file_tensor(job: ConversionJob) -> GgufTensor | ExpertStack | None:
    sources = [tensor for tensors in job.sources.values() for tensor in tensors]
    source = sources[0] if len(sources) == 1 else None
    return source if isinstance(source, GgufTensor | ExpertStack) else None
