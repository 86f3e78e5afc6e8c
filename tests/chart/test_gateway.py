"""The gateways of the chart: their pods, what they may reach, what the operator may for them."""

from __future__ import annotations

from typing import Any

import pytest
from helm import Helm
from model_contexts import make_context

from faasmoe_gateway.config import GatewayConfig
from faasmoe_operator.kube.config import OperatorConfig
from faasmoe_operator.kube.manifests import serving_objects
from faasmoe_operator.kube.types import Object

NAME = {"app.kubernetes.io/name": "faasmoe-gateway"}
OPERATOR = {"app.kubernetes.io/name": "faasmoe-operator"}


@pytest.fixture(scope="module")
def objects(helm: Helm) -> list[Object]:
    values = {"gateway": {"enabled": True, "podMonitor": {"enabled": True}}}
    return helm.template(values)


def only(objects: list[Object], kind: str, name: dict[str, str] = NAME) -> Any:
    (obj,) = (
        o
        for o in objects
        if o["kind"] == kind and name.items() <= o["metadata"].get("labels", {}).items()
    )
    return obj


def environment(deployment: Object) -> dict[str, str]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {v["name"]: str(v.get("value", "faasmoe-x")) for v in container["env"]}


def test_is_off_by_default(rendered: dict[str, list[Object]]) -> None:
    found = [o for o in rendered["default"] if NAME.items() <= o["metadata"]["labels"].items()]
    assert found == []
    config = OperatorConfig.from_env(environment(only(rendered["default"], "Deployment", OPERATOR)))
    assert config.gateways is None


def test_gateway_parses_its_settings_and_meets_the_operator(objects: list[Object]) -> None:
    deployment = only(objects, "Deployment")
    config = GatewayConfig.from_env(environment(deployment))
    operator = OperatorConfig.from_env(environment(only(objects, "Deployment", OPERATOR)))
    service = only(objects, "Service", OPERATOR)
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert config.control_address == f"{host}:{operator.gateway_port}"
    assert operator.gateway_port in [port["port"] for port in service["spec"]["ports"]]
    spec = deployment["spec"]["template"]["spec"]
    (secret,) = (v["secret"] for v in spec["volumes"] if "secret" in v)
    assert secret["secretName"] == operator.gateway_secret
    (container,) = spec["containers"]
    folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "gateway")
    assert str(config.control_token_file) == f"{folder}/token"
    assert str(config.gateway_file) == f"{folder}/gateway.json"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.port, "metrics": config.gateway_metrics_port}
    assert config.drain_timeout_s == spec["terminationGracePeriodSeconds"] - 20
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert operator.gateways is not None
    assert dict(operator.gateways.pod_labels).items() <= labels.items()


def test_pods_have_no_token_and_no_permission(objects: list[Object]) -> None:
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    account = spec["serviceAccountName"]
    assert spec["automountServiceAccountToken"] is False
    assert only(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    bindings = [o for o in objects if o["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    assert bindings
    assert not [b for b in bindings if account in [s["name"] for s in b["subjects"]]]


def test_replicas_are_spread_and_evicted_one_by_one(objects: list[Object]) -> None:
    deployment = only(objects, "Deployment")
    assert deployment["spec"]["replicas"] == 2
    spec, selector = deployment["spec"]["template"]["spec"], deployment["spec"]["selector"]
    (term,) = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["labelSelector"] == selector
    assert spec["topologySpreadConstraints"][0]["labelSelector"] == selector
    budget = only(objects, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]) == (1, selector)
    assert only(objects, "PodMonitor")["spec"]["selector"] == selector


def test_network_policies_let_gateways_reach_operator_and_routers(objects: list[Object]) -> None:
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    policy = only(objects, "NetworkPolicy")["spec"]
    assert policy["ingress"][0] == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    _, to_operator, to_routers = policy["egress"]
    (peer,) = to_routers["to"]
    (router,) = (o for o in serving_objects(make_context()) if o["kind"] == "Deployment")
    router_labels = router["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= router_labels.items()
    assert to_operator["ports"] == [{"port": 8092, "protocol": "TCP"}]
    operators = [
        o["spec"]
        for o in objects
        if o["kind"] == "NetworkPolicy"
        and o["spec"]["podSelector"]["matchLabels"].items() >= OPERATOR.items()
    ]
    (rule,) = (r for r in operators[0]["ingress"] if r["ports"][0]["port"] == 8092)
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()


def test_operator_may_read_secrets_by_name_only_for_gateways(
    objects: list[Object], rendered: dict[str, list[Object]]
) -> None:
    def verbs(found: list[Object], kind: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        return [
            (tuple(rule["verbs"]), tuple(rule.get("resourceNames", ())))
            for obj in found
            if obj["kind"] == kind
            for rule in obj["rules"]
            if "secrets" in rule["resources"]
        ]

    assert verbs(rendered["default"], "ClusterRole") == [(("create",), ())]
    assert verbs(objects, "ClusterRole") == [(("get", "create"), ())]
    assert (("patch",), ("faasmoe-gateway",)) in verbs(objects, "Role")
    assert not [v for v in verbs(rendered["default"], "Role") if "patch" in v[0]]
