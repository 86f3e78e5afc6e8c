"""Resource requests and limits of pods, computed from the store summary unless overridden.

    sandbox  memory = functionsPerSandbox * largest function + runtime     cpu = threads
    router   memory = its weights + KV cache + logits + runtime            cpu = 1, at most 4

The memory limit equals the request, or is slightly more where a sandbox's requests follow what is
attached: its pods then request the runtime's memory and hardly any CPU while they are generic.
Weights of functions are pages of a mapped file, which the kernel reclaims where a sandbox would
exceed its limit. A router's weights and KV cache count in float32 where it may compute in that: the
node's CPU is not known here. With CUDA, weights and KV cache are on the device; host memory holds
the runtime and the pages read to fill the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from faasmoe_operator.api.v1alpha1.field_types import parse_quantity, quantity_to_bytes
from faasmoe_operator.api.v1alpha1.pod_template import ResourceRequirements
from faasmoe_operator.control.functions import partitioning_of
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.store_summary import StoreSummary
from faasmoe_operator.kube.types import Object
from faasmoe_operator.plan.functions import largest_function_bytes
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy
from faasmoe_operator.plan.router_weights import (
    element_bytes,
    router_weights_bytes,
    widest_router_dtype,
)

MIB = 1 << 20
GIB = 1 << 30
GPU_RESOURCE = "nvidia.com/gpu"
ROUTER_RUNTIME_BYTES = {"cuda": 4 * GIB}
ROUTER_RUNTIME_CPU_BYTES = GIB
SANDBOX_RUNTIME_BYTES = {"cuda": 3 * GIB}
SANDBOX_RUNTIME_CPU_BYTES = 512 * MIB
KV_CACHE_BYTES = 2 * GIB
"""The router's default, unless one request of maximum length needs more."""
DEFAULT_MODEL_LEN = 8192
LOGITS_COPIES = 2
IDLE_SANDBOX_CPU_MILLIS = 50
RESIZE_MARGIN_BYTES = 64 * MIB
CACHE_FUNCTIONS_FACTOR = 2
"""Functions that a cache has room for, over those that its sandbox holds."""
FLOAT_BYTES = 4
ROUTER_CORES = 1
ROUTER_MAX_CORES = 4
"""Steps are short and shared by many requests; between them a router waits for functions."""


def sandbox_resources(ctx: ModelContext) -> Object:
    """Return requests and limits of a new sandbox; raises PlanError for an invalid granularity.

    If requests follow what is attached, these are the ones of a generic sandbox.
    """
    full, policy = _full_sandbox_resources(ctx), resize_policy(ctx)
    if policy is None:
        return full
    requests = {**full["requests"], **request_quantities(policy.idle)}
    return {"requests": requests, "limits": full["limits"]}


def resize_policy(ctx: ModelContext) -> ResizePolicy | None:
    """Return what sandboxes request by what is attached; None if they have a fixed size.

    Resources that the template requests are fixed. A resize must not change the QoS class, so
    a sandbox whose requests would all reach its limits has a fixed size.
    """
    experts = ctx.spec.experts
    if not ctx.can_resize or experts.resize == "none":
        return None
    resources = _full_sandbox_resources(ctx)
    requests, limits = resources["requests"], resources["limits"]
    if all(_is_equal(requests[name], limits.get(name)) for name in ("cpu", "memory")):
        return None
    cpu_millis = int(parse_quantity(requests["cpu"]) * 1000)
    full = PodRequests(cpu_millis, int(parse_quantity(requests["memory"])))
    fixed = (experts.template.resources and experts.template.resources.requests) or {}
    runtime = SANDBOX_RUNTIME_BYTES.get(experts.device, SANDBOX_RUNTIME_CPU_BYTES)
    idle = PodRequests(
        full.cpu_millis if "cpu" in fixed else min(IDLE_SANDBOX_CPU_MILLIS, full.cpu_millis),
        full.memory_bytes if "memory" in fixed else min(runtime, full.memory_bytes),
    )
    return None if idle == full else ResizePolicy(idle, full)


def request_quantities(requests: PodRequests) -> dict[str, str]:
    """Return requests as quantities."""
    return {"cpu": f"{requests.cpu_millis}m", "memory": str(requests.memory_bytes)}


def _full_sandbox_resources(ctx: ModelContext) -> Object:
    """Return requests and limits of a sandbox with all the functions that it can hold."""
    experts = ctx.spec.experts
    runtime = SANDBOX_RUNTIME_BYTES.get(experts.device, SANDBOX_RUNTIME_CPU_BYTES)
    memory_bytes = runtime + experts.functions_per_sandbox * _largest_function_bytes(ctx)
    is_resized = ctx.can_resize and experts.resize != "none"
    # Beyond the request, so that the pod stays Burstable: a resize cannot change its QoS class.
    limit_bytes = memory_bytes + (RESIZE_MARGIN_BYTES if is_resized else 0)
    cores = str(experts.threads)
    computed = _resources(
        {"cpu": cores, "memory": mebibytes(memory_bytes)},
        {"cpu": cores, "memory": mebibytes(limit_bytes)},
        experts.device,
    )
    return with_overrides(computed, experts.template.resources)


def _is_equal(request: str, limit: str | None) -> bool:
    return limit is not None and parse_quantity(request) == parse_quantity(limit)


def sandbox_cache_bytes(ctx: ModelContext) -> int:
    """Return the size of a sandbox's cache, of a model that has some; raises PlanError."""
    cache = ctx.spec.store.cache
    if cache is not None and cache.size_limit is not None:
        return quantity_to_bytes(cache.size_limit)
    functions = ctx.spec.experts.functions_per_sandbox * _largest_function_bytes(ctx)
    return max(CACHE_FUNCTIONS_FACTOR * functions, MIB)


def router_resources(ctx: ModelContext) -> Object:
    """Return requests and limits of a router."""
    router = ctx.spec.router
    runtime = ROUTER_RUNTIME_BYTES.get(router.device, ROUTER_RUNTIME_CPU_BYTES)
    model_bytes = 0 if ctx.summary is None else _router_bytes(ctx, ctx.summary)
    memory = mebibytes(runtime + model_bytes)
    computed = _resources(
        {"cpu": str(ROUTER_CORES), "memory": memory},
        {"cpu": str(ROUTER_MAX_CORES), "memory": memory},
        router.device,
    )
    return with_overrides(computed, router.template.resources)


def with_overrides(computed: Object, overrides: ResourceRequirements | None) -> Object:
    """Return computed requests and limits, replaced by overrides.

    If only a resource's request or limit is overridden and the computed other one conflicts with
    it, the other one is set to the same value.
    """
    if overrides is None:
        return computed
    override_requests, override_limits = overrides.requests or {}, overrides.limits or {}
    requests = {**computed["requests"], **override_requests}
    limits = {**_without_gpu(computed["limits"], override_limits), **override_limits}
    for name in requests.keys() & limits.keys():
        if parse_quantity(requests[name]) > parse_quantity(limits[name]):
            winner = override_limits if name in override_limits else override_requests
            requests[name] = limits[name] = winner[name]
    return {"requests": requests, "limits": limits}


def _largest_function_bytes(ctx: ModelContext) -> int:
    if ctx.summary is None:
        return 0
    return largest_function_bytes(
        ctx.summary.expanded_layers(), partitioning_of(ctx.spec.granularity)
    )


def _router_bytes(ctx: ModelContext, summary: StoreSummary) -> int:
    """Return the host memory of a router besides its runtime, in bytes.

    With CUDA, logits and KV cache are on the device, and weights are read in the store's dtype.
    """
    router = ctx.spec.router
    if router.device == "cuda":
        return summary.router_bytes
    weights = router_weights_bytes(
        summary.router_bytes,
        store_dtype=summary.dtype,
        dtype=_router_dtype(ctx, summary),
        quantized_bytes=summary.router_quantized_bytes,
    )
    logits = router.max_num_batched_tokens * summary.vocab_size * FLOAT_BYTES * LOGITS_COPIES
    return weights + logits + _kv_cache_bytes(ctx, summary)


def _router_dtype(ctx: ModelContext, summary: StoreSummary) -> str:
    router = ctx.spec.router
    return widest_router_dtype(router.dtype, router.device, store_dtype=summary.dtype)


def _kv_cache_bytes(ctx: ModelContext, summary: StoreSummary) -> int:
    """Return the size of the KV cache, in bytes, with room for one request of maximum length.

    The number of KV heads is not known here; as many as attention heads are assumed.
    """
    router = ctx.spec.router
    if router.kv_cache_bytes is not None:
        return router.kv_cache_bytes
    length = router.max_model_len or min(summary.max_position_embeddings, DEFAULT_MODEL_LEN)
    dtype_bytes = element_bytes(_router_dtype(ctx, summary))
    bytes_per_token = summary.num_hidden_layers * 2 * summary.hidden_size * dtype_bytes
    return max(KV_CACHE_BYTES, length * bytes_per_token)


def _resources(requests: Mapping[str, str], limits: Mapping[str, str], device: str) -> Object:
    gpu = {GPU_RESOURCE: "1"} if device == "cuda" else {}
    return {"requests": dict(requests), "limits": {**limits, **gpu}}


def _without_gpu(limits: Mapping[str, str], override_limits: Mapping[str, str]) -> dict[str, str]:
    """Drop the whole GPU if the overrides request another device, such as a MIG slice."""
    is_other_device = any("/" in name for name in override_limits)
    return {
        name: value for name, value in limits.items() if name != GPU_RESOURCE or not is_other_device
    }


def mebibytes(size_bytes: int) -> str:
    """Return a quantity of at least this size."""
    return f"{-(-Fraction(size_bytes) // MIB)}Mi"
