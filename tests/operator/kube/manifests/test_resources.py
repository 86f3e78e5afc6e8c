from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests.resources import router_resources, sandbox_resources
from faasmoe_operator.kube.types import Object

GIB = 1024
FUNCTION = 20 * 16  # MiB: a third of 60 experts
RUNTIME = 512
LOGITS = 512 * 151_936 * 4 * 2 / (1 << 20)


def mib(resources: Object, of: str = "requests") -> int:
    text = resources[of]["memory"]
    assert text.endswith("Mi")
    return int(text.removesuffix("Mi"))


def test_a_sandbox_has_room_for_its_largest_functions_and_its_runtime() -> None:
    assert mib(sandbox_resources(make_context())) == FUNCTION + RUNTIME
    three = make_context({"experts": {"functionsPerSandbox": 3}})
    assert mib(sandbox_resources(three)) == 3 * FUNCTION + RUNTIME
    uneven = make_context({"granularity": {"expertsPerFunction": 50, "layersPerFunction": 2}})
    assert mib(sandbox_resources(uneven)) == 2 * 50 * 16 + RUNTIME


def test_a_sandbox_has_a_core_for_each_thread() -> None:
    resources = sandbox_resources(make_context({"experts": {"threads": 4}}))
    assert (resources["requests"]["cpu"], resources["limits"]["cpu"]) == ("4", "4")


def test_a_sandbox_is_of_the_guaranteed_class() -> None:
    resources = sandbox_resources(make_context())
    assert resources["requests"] == resources["limits"]


def test_a_router_has_room_for_weights_cache_and_logits() -> None:
    expected = 3 * GIB + 2 * GIB + LOGITS + GIB
    assert mib(router_resources(make_context())) == pytest.approx(expected, abs=1)


def test_a_router_has_room_for_the_cache_that_is_asked_for() -> None:
    ctx = make_context({"router": {"kvCacheMemory": "6Gi"}})
    assert mib(router_resources(ctx)) == pytest.approx(3 * GIB + 6 * GIB + LOGITS + GIB, abs=1)


def test_a_router_has_room_for_one_request_of_full_length() -> None:
    ctx = make_context({"router": {"maxModelLen": 32_768}})
    cache = 32_768 * 24 * 2 * 2048 * 2 / (1 << 20)
    assert mib(router_resources(ctx)) == pytest.approx(3 * GIB + cache + LOGITS + GIB, abs=1)


def test_with_cuda_cache_and_logits_are_on_the_device() -> None:
    resources = router_resources(make_context({"router": {"device": "cuda"}}))
    assert mib(resources) == 3 * GIB + 4 * GIB
    assert resources["limits"]["nvidia.com/gpu"] == "1"


def test_asks_for_a_gpu_only_where_cuda_is_asked_for() -> None:
    ctx = make_context({"experts": {"device": "cuda"}, "router": {"device": "auto"}})
    assert sandbox_resources(ctx)["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in router_resources(ctx)["limits"]


def test_a_part_of_a_gpu_takes_the_place_of_a_whole_one() -> None:
    template = {"resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}}
    ctx = make_context({"experts": {"device": "cuda", "template": template}})
    limits = sandbox_resources(ctx)["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == "1"
    assert "nvidia.com/gpu" not in limits


def test_a_template_takes_the_place_of_what_it_names() -> None:
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
def test_what_a_template_leaves_out_follows_where_it_would_contradict(
    given: dict[str, Any], requests: str, limits: str
) -> None:
    ctx = make_context({"experts": {"template": {"resources": given}}})
    resources = sandbox_resources(ctx)
    assert resources["requests"]["memory"] == requests
    assert resources["limits"]["memory"] == limits
