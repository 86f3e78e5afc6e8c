from collections.abc import Mapping
from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests import ModelContext, serving_objects, store_objects
from faasmoe_operator.kube.types import Object

ROUTER = {"faasmoe.dev/model": "qwen", "app.kubernetes.io/component": "router"}
SANDBOX = {"faasmoe.dev/model": "qwen", "app.kubernetes.io/component": "sandbox"}
STORE = {"faasmoe.dev/model": "qwen", "app.kubernetes.io/component": "store"}
OTHER_MODELS_ROUTER = {**ROUTER, "faasmoe.dev/model": "other"}
OPERATOR = {"app.kubernetes.io/instance": "faasmoe"}
STRANGER = {"app": "stranger"}
IN_MODEL, IN_OPERATOR, ELSEWHERE = "llm", "faasmoe", "apps"
Peer = tuple[str, Mapping[str, str]]
OUTSIDE: Peer = ("", {})


def policies(ctx: ModelContext) -> list[Any]:
    objects = [*store_objects(ctx), *serving_objects(ctx)]
    return [obj["spec"] for obj in objects if obj["kind"] == "NetworkPolicy"]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    required: Mapping[str, str] = selector.get("matchLabels", {})
    return labels.items() >= required.items()


def rules_allow(rules: list[Any], side: str, peer: Peer, port: int) -> bool:
    """Return whether any rule allows the peer, by the semantics of Kubernetes."""
    namespace, labels = peer
    for rule in rules:
        if port not in [entry["port"] for entry in rule["ports"]]:
            continue
        if side not in rule:
            return True
        for entry in rule[side]:
            own_namespace = {"matchLabels": {"kubernetes.io/metadata.name": IN_MODEL}}
            namespace_selector = entry.get("namespaceSelector", own_namespace)
            names = {"kubernetes.io/metadata.name": namespace}
            is_selected = bool(namespace) and selects(namespace_selector, names)
            if is_selected and selects(entry.get("podSelector", {}), labels):
                return True
    return False


def allowed(
    ctx: ModelContext, pod: Mapping[str, str], direction: str, peer: Peer, port: int
) -> bool:
    """Return whether the policies that select a pod allow a connection."""
    selected = [policy for policy in policies(ctx) if selects(policy["podSelector"], pod)]
    assert selected, "no policy selects the pod: all traffic would be allowed"
    side = {"ingress": "from", "egress": "to"}[direction]
    return any(rules_allow(policy[direction], side, peer, port) for policy in selected)


@pytest.mark.parametrize(
    ("pod", "direction", "peer", "port", "expected"),
    [
        pytest.param(ROUTER, "ingress", (ELSEWHERE, STRANGER), 8000, True, id="a-client"),
        pytest.param(ROUTER, "ingress", (ELSEWHERE, STRANGER), 22, False, id="another-port"),
        pytest.param(ROUTER, "ingress", OUTSIDE, 8000, False, id="no-pod"),
        pytest.param(ROUTER, "egress", (IN_MODEL, SANDBOX), 9090, True, id="to-a-sandbox"),
        pytest.param(ROUTER, "egress", (ELSEWHERE, SANDBOX), 9090, False, id="to-anothers"),
        pytest.param(ROUTER, "egress", (IN_OPERATOR, OPERATOR), 8090, True, id="to-control"),
        pytest.param(ROUTER, "egress", (ELSEWHERE, OPERATOR), 8090, False, id="false-control"),
        pytest.param(ROUTER, "egress", OUTSIDE, 53, True, id="router-dns"),
        pytest.param(ROUTER, "egress", OUTSIDE, 443, False, id="router-out"),
        pytest.param(SANDBOX, "ingress", (IN_MODEL, ROUTER), 9090, True, id="from-a-router"),
        pytest.param(
            SANDBOX, "ingress", (IN_MODEL, OTHER_MODELS_ROUTER), 9090, False, id="anothers"
        ),
        pytest.param(SANDBOX, "ingress", (ELSEWHERE, ROUTER), 9090, False, id="false-router"),
        pytest.param(SANDBOX, "ingress", (IN_OPERATOR, OPERATOR), 9090, True, id="operator"),
        pytest.param(SANDBOX, "ingress", (IN_MODEL, STRANGER), 9090, False, id="a-stranger"),
        pytest.param(SANDBOX, "egress", OUTSIDE, 443, False, id="sandbox-out"),
        pytest.param(SANDBOX, "egress", OUTSIDE, 53, False, id="sandbox-dns"),
        pytest.param(STORE, "egress", OUTSIDE, 443, True, id="to-the-hub"),
        pytest.param(STORE, "egress", OUTSIDE, 53, True, id="store-dns"),
        pytest.param(STORE, "egress", (IN_MODEL, SANDBOX), 9090, False, id="store-to-sandbox"),
        pytest.param(STORE, "ingress", (IN_MODEL, ROUTER), 8000, False, id="into-the-store"),
    ],
)
def test_allowed_connections(
    pod: Mapping[str, str], direction: str, peer: Peer, port: int, expected: bool
) -> None:
    assert allowed(make_context(), pod, direction, peer, port) is expected


def test_default_deny_covers_all_pods_in_both_directions() -> None:
    unknown = {"faasmoe.dev/model": "qwen"}
    for direction in ("ingress", "egress"):
        assert not allowed(make_context(), unknown, direction, (IN_MODEL, ROUTER), 9090)


def test_all_policies_cover_both_directions() -> None:
    assert all(p["policyTypes"] == ["Ingress", "Egress"] for p in policies(make_context()))


def test_only_configured_clients_reach_the_router() -> None:
    clients = [
        {"podSelector": {"matchLabels": {"role": "chat"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}}},
    ]
    ctx = make_context({"networking": {"clients": clients}})
    assert allowed(ctx, ROUTER, "ingress", (IN_MODEL, {"role": "chat"}), 8000)
    assert allowed(ctx, ROUTER, "ingress", ("edge", STRANGER), 8000)
    assert not allowed(ctx, ROUTER, "ingress", (ELSEWHERE, {"role": "chat"}), 8000)
    assert not allowed(ctx, ROUTER, "ingress", (IN_MODEL, STRANGER), 8000)


def test_policies_precede_the_store_job() -> None:
    objects = store_objects(make_context(summary=None))
    names = [obj["metadata"]["name"] for obj in objects if obj["kind"] == "NetworkPolicy"]
    assert names == ["qwen-default-deny", "qwen-store"]
    assert [obj["kind"] for obj in objects].index("NetworkPolicy") < len(objects) - 1
    assert objects[-1]["kind"] == "Job"


CACHES: dict[str, Any] = {"store": {"cache": {}}}
STORE_SERVER = {**STORE, "app.kubernetes.io/component": "store-server"}


@pytest.mark.parametrize(
    ("pod", "direction", "peer", "port", "expected"),
    [
        pytest.param(SANDBOX, "egress", (IN_MODEL, STORE_SERVER), 9092, True, id="to-the-server"),
        pytest.param(SANDBOX, "egress", OUTSIDE, 53, True, id="sandbox-dns"),
        pytest.param(SANDBOX, "egress", OUTSIDE, 443, False, id="sandbox-out"),
        pytest.param(SANDBOX, "egress", (ELSEWHERE, STORE_SERVER), 9092, False, id="to-anothers"),
        pytest.param(STORE_SERVER, "ingress", (IN_MODEL, SANDBOX), 9092, True, id="sandboxes"),
        pytest.param(STORE_SERVER, "ingress", (IN_MODEL, STRANGER), 9092, False, id="a-stranger"),
        pytest.param(STORE_SERVER, "ingress", (ELSEWHERE, SANDBOX), 9092, False, id="anothers"),
        pytest.param(STORE_SERVER, "egress", OUTSIDE, 443, False, id="server-out"),
    ],
)
def test_connections_to_the_store_server(
    pod: Mapping[str, str], direction: str, peer: Peer, port: int, expected: bool
) -> None:
    assert allowed(make_context(CACHES), pod, direction, peer, port) is expected
