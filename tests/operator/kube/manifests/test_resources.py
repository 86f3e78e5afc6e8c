from dataclasses import replace
from typing import Any

import pytest
from model_contexts import SUMMARY, make_context

from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.resources import (
    resize_policy,
    router_resources,
    sandbox_resources,
)
from faasmoe_operator.kube.types import Object
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy

GIB = 1024
FUNCTION = 20 * 16  # MiB: a third of 60 experts
RUNTIME = 512
LOGITS = 512 * 151_936 * 4 * 2 / (1 << 20)


def mib(resources: Object, of: str = "requests") -> int:
    text = resources[of]["memory"]
    assert text.endswith("Mi")
    return int(text.removesuffix("Mi"))


def test_sandbox_memory_fits_its_largest_functions_and_the_runtime() -> None:
    assert mib(sandbox_resources(make_context())) == FUNCTION + RUNTIME
    three = make_context({"experts": {"functionsPerSandbox": 3}})
    assert mib(sandbox_resources(three)) == 3 * FUNCTION + RUNTIME
    uneven = make_context({"granularity": {"expertsPerFunction": 50, "layersPerFunction": 2}})
    assert mib(sandbox_resources(uneven)) == 2 * 50 * 16 + RUNTIME


def test_sandbox_cpu_equals_its_threads() -> None:
    resources = sandbox_resources(make_context({"experts": {"threads": 4}}))
    assert (resources["requests"]["cpu"], resources["limits"]["cpu"]) == ("4", "4")


def test_sandbox_has_the_guaranteed_qos_class() -> None:
    resources = sandbox_resources(make_context())
    assert resources["requests"] == resources["limits"]


def resizable(**experts: Any) -> ModelContext:
    return make_context({"experts": experts}, can_resize=True)


def test_a_generic_sandbox_requests_little_where_pods_can_be_resized() -> None:
    resources = sandbox_resources(resizable(threads=4))
    assert resources["requests"] == {"cpu": "50m", "memory": str(RUNTIME << 20)}
    assert resources["limits"]["cpu"] == "4"
    assert mib(resources, "limits") > FUNCTION + RUNTIME


def test_requests_grow_to_a_full_sandbox_that_stays_burstable() -> None:
    ctx = resizable(threads=4, functionsPerSandbox=2)
    policy = resize_policy(ctx)
    assert policy is not None
    assert policy.idle == PodRequests(50, RUNTIME << 20)
    assert policy.full == PodRequests(4000, (RUNTIME + 2 * FUNCTION) << 20)
    assert policy.full.memory_bytes < mib(sandbox_resources(ctx), "limits") << 20


@pytest.mark.parametrize(
    ("experts", "can_resize"),
    [
        pytest.param({}, False, id="not-served"),
        pytest.param({"resize": "none"}, True, id="switched-off"),
        pytest.param(
            {"template": {"resources": {"requests": {"cpu": "1", "memory": "8192Mi"}}}},
            True,
            id="all-is-requested-by-the-template",
        ),
        pytest.param(
            {"template": {"resources": {"limits": {"memory": f"{RUNTIME + FUNCTION}Mi"}}}},
            True,
            id="a-resize-would-make-it-guaranteed",
        ),
    ],
)
def test_a_sandbox_has_a_fixed_size_if_it_cannot_be_resized(
    experts: dict[str, Any], can_resize: bool
) -> None:
    ctx = make_context({"experts": experts}, can_resize=can_resize)
    assert resize_policy(ctx) is None
    assert mib(sandbox_resources(ctx)) >= FUNCTION + RUNTIME


def test_what_the_template_requests_is_fixed() -> None:
    resources = {"requests": {"memory": "8Gi"}, "limits": {"memory": "9Gi"}}
    ctx = resizable(threads=4, template={"resources": resources})
    policy = resize_policy(ctx)
    assert policy == ResizePolicy(PodRequests(50, 8 << 30), PodRequests(4000, 8 << 30))
    assert sandbox_resources(ctx)["requests"] == {"cpu": "50m", "memory": str(8 << 30)}


WEIGHTS = 3 * GIB  # in the store, as bfloat16


def test_router_memory_fits_float32_weights_cache_and_logits() -> None:
    cache = 8192 * 24 * 2 * 2048 * 4 / (1 << 20)  # one request of full length
    expected = 2 * WEIGHTS + cache + LOGITS + GIB
    assert mib(router_resources(make_context())) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("stored", "router", "weights"),
    [
        ("bfloat16", {"dtype": "auto", "device": "cpu"}, 2 * WEIGHTS),
        ("bfloat16", {"dtype": "auto", "device": "auto"}, 2 * WEIGHTS),
        ("float16", {"dtype": "float32"}, 2 * WEIGHTS),
        ("bfloat16", {"dtype": "bfloat16"}, WEIGHTS),
        ("bfloat16", {"dtype": "float16"}, WEIGHTS),
        ("float32", {"dtype": "auto"}, WEIGHTS),
        ("float32", {"dtype": "bfloat16"}, WEIGHTS // 2),
    ],
)
def test_router_memory_counts_weights_in_the_routers_dtype(
    stored: str, router: dict[str, Any], weights: int
) -> None:
    spec = {"router": {**router, "maxModelLen": 4096}}
    ctx = make_context(spec, summary=replace(SUMMARY, dtype=stored))
    expected = weights + 2 * GIB + LOGITS + GIB
    assert mib(router_resources(ctx)) == pytest.approx(expected, abs=1)


def test_router_memory_counts_quantised_weights_as_they_are() -> None:
    quantized = replace(SUMMARY, router_quantized_bytes=1 << 30)
    ctx = make_context({"router": {"dtype": "float32", "maxModelLen": 4096}}, summary=quantized)
    expected = 2 * (WEIGHTS - GIB) + GIB + 2 * GIB + LOGITS + GIB
    assert mib(router_resources(ctx)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_with_cuda_weights_are_read_in_the_stores_dtype(dtype: str) -> None:
    resources = router_resources(make_context({"router": {"device": "cuda", "dtype": dtype}}))
    assert mib(resources) == WEIGHTS + 4 * GIB


def test_router_memory_fits_the_configured_cache() -> None:
    ctx = make_context({"router": {"kvCacheMemory": "6Gi"}})
    assert mib(router_resources(ctx)) == pytest.approx(2 * WEIGHTS + 6 * GIB + LOGITS + GIB, abs=1)


def test_router_memory_fits_one_request_of_maximum_length() -> None:
    for dtype, scale in (("bfloat16", 1), ("float32", 2)):
        ctx = make_context({"router": {"maxModelLen": 32_768, "dtype": dtype}})
        cache = scale * 32_768 * 24 * 2 * 2048 * 2 / (1 << 20)
        expected = scale * WEIGHTS + cache + LOGITS + GIB
        assert mib(router_resources(ctx)) == pytest.approx(expected, abs=1)


def test_with_cuda_cache_and_logits_use_no_host_memory() -> None:
    resources = router_resources(make_context({"router": {"device": "cuda"}}))
    assert mib(resources) == 3 * GIB + 4 * GIB
    assert resources["limits"]["nvidia.com/gpu"] == "1"


def test_requests_a_gpu_only_for_cuda() -> None:
    ctx = make_context({"experts": {"device": "cuda"}, "router": {"device": "auto"}})
    assert sandbox_resources(ctx)["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in router_resources(ctx)["limits"]


def test_a_gpu_slice_replaces_the_whole_gpu() -> None:
    template = {"resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}}
    ctx = make_context({"experts": {"device": "cuda", "template": template}})
    limits = sandbox_resources(ctx)["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == "1"
    assert "nvidia.com/gpu" not in limits


def test_template_resources_override_computed_ones() -> None:
    given = {"requests": {"memory": "3Gi", "cpu": "500m"}, "limits": {"memory": "5Gi", "cpu": 2}}
    ctx = make_context({"experts": {"template": {"resources": given}}})
    resources = sandbox_resources(ctx)
    assert resources["requests"] == {"memory": "3Gi", "cpu": "500m"}
    assert resources["limits"] == {"memory": "5Gi", "cpu": "2"}


@pytest.mark.parametrize(
    ("given", "requests", "limits"),
    [
        pytest.param({"limits": {"memory": "256Mi"}}, "256Mi", "256Mi", id="lower-limit"),
        pytest.param({"requests": {"memory": "9Gi"}}, "9Gi", "9Gi", id="higher-request"),
        pytest.param({"limits": {"memory": "9Gi"}}, "832Mi", "9Gi", id="higher-limit"),
        pytest.param({"requests": {"memory": "1Mi"}}, "1Mi", "832Mi", id="lower-request"),
    ],
)
def test_conflicting_computed_values_follow_the_override(
    given: dict[str, Any], requests: str, limits: str
) -> None:
    ctx = make_context({"experts": {"template": {"resources": given}}})
    resources = sandbox_resources(ctx)
    assert resources["requests"]["memory"] == requests
    assert resources["limits"]["memory"] == limits
