"""Says what a store makes of a GGUF file's types, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from faasmoe_contracts.store.quantization import COMPONENT_NAMES
from faasmoe_router.checkpoint.gguf.ggml_types import FLOAT_DTYPES
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
        total.stored_bytes += sum(sizes.get(job.name + x, 0) for x in COMPONENT_NAMES)
    for (is_router, types, action), total in sorted(totals.items()):
        part = "router" if is_router else "experts"
        stored, published = total.stored_bytes / _GB, total.file_bytes / _GB
        yield (
            f"{part}: {total.count} weights in {types} are {action}: {stored:.3g} GB, "
            f"{stored / published:.2f} times the {published:.3g} GB of the file"
        )


def _action(plan: StorePlan, name: str, types: str, dtype: str) -> str:
    """Return what becomes of a parameter."""
    if name in plan.kept:
        return f"kept as {plan.kept[name].quantization.scheme}"
    if name in plan.quantization:
        again = "" if types in FLOAT_DTYPES else " again"
        return f"quantised{again} as {plan.quantization[name].scheme} (lossy)"
    return f"stored as {dtype}" if types in FLOAT_DTYPES else f"dequantised to {dtype}"


def _file_tensor(job: ConversionJob) -> GgufTensor | ExpertStack | None:
    sources = [tensor for tensors in job.sources.values() for tensor in tensors]
    source = sources[0] if len(sources) == 1 else None
    return source if isinstance(source, GgufTensor | ExpertStack) else None
