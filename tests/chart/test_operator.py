"""The operator's pod: settings, security context, network policy and control API."""

from typing import Any

import pytest
import yaml
from helm import CHART, Helm
from model_contexts import make_context

from faasmoe_operator.kube.config import PREFIX, OperatorConfig
from faasmoe_operator.kube.manifests import serving_objects
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_PORT as SANDBOX_PORT
from faasmoe_operator.kube.manifests.sandbox import sandbox_pod
from faasmoe_operator.kube.types import Object

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
FIELDS = {"metadata.namespace": "faasmoe-system", "metadata.name": "faasmoe-operator-x-y"}


def only(objects: list[Object], kind: str) -> Any:
    """Return the one object of a kind that is not the gateways'."""
    (obj,) = (obj for obj in objects if obj["kind"] == kind and not is_of_gateways(obj))
    return obj


def is_of_gateways(obj: Object) -> bool:
    labels: dict[str, str] = obj["metadata"].get("labels", {})
    return labels.get("app.kubernetes.io/name") == "faasmoe-gateway"


def pod_template(objects: list[Object]) -> Any:
    return only(objects, "Deployment")["spec"]["template"]


def network_policy(objects: list[Object]) -> Any:
    """Return the spec of the NetworkPolicy that selects the operator's pods."""
    labels = pod_template(objects)["metadata"]["labels"]
    (spec,) = (
        obj["spec"]
        for obj in objects
        if obj["kind"] == "NetworkPolicy"
        and labels.items() >= obj["spec"]["podSelector"]["matchLabels"].items()
    )
    return spec


def operator_config(objects: list[Object]) -> OperatorConfig:
    """Return the configuration as the operator in the pod parses it."""
    (container,) = pod_template(objects)["spec"]["containers"]
    env = {
        v["name"]: v["value"] if "value" in v else FIELDS[v["valueFrom"]["fieldRef"]["fieldPath"]]
        for v in container["env"]
    }
    return OperatorConfig.from_env(env)


def test_operator_parses_all_settings(rendered: dict[str, list[Object]]) -> None:
    config = operator_config(rendered["everything"])
    assert config.namespace == "faasmoe-system"
    assert config.identity == "faasmoe-operator-x-y"
    assert config.watch_namespaces == ()
    assert config.images.router == "registry.example.com/mirror/llm/router:1.2.3"
    assert config.images.expert == "gpu.example.com/faasmoe/expert:1.2.3-cuda"
    assert config.images.pull_policy == "Always"
    assert config.images.pull_secrets == ("mirror", "gpu")
    assert config.root_key_secret == "our-moe-root-key"
    assert config.leader_election is True
    assert (config.workers, config.log_format, config.log_level) == (16, "text", "DEBUG")
    assert config.control.port == 9443


def test_chart_sets_every_setting(rendered: dict[str, list[Object]]) -> None:
    (container,) = pod_template(rendered["default"])["spec"]["containers"]
    variables = {variable["name"] for variable in container["env"]}
    assert variables == {f"{PREFIX}{name}" for name in setting_names()}


def setting_names() -> set[str]:
    """Return the names of all settings without their prefix."""
    return {name.upper() for name in OperatorConfig.model_fields}


def test_default_is_one_operator_for_all_namespaces(
    rendered: dict[str, list[Object]],
) -> None:
    config = operator_config(rendered["default"])
    assert config.watch_namespaces == ()
    assert config.leader_election is False
    assert only(rendered["default"], "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_watches_namespaces_in_which_it_has_a_role(
    rendered: dict[str, list[Object]],
) -> None:
    config = operator_config(rendered["namespaced"])
    assert config.watch_namespaces == ("llm", "research")
    assert config.leader_election is True
    strategy = only(rendered["namespaced"], "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate"}


def test_control_url_points_to_service(objects: list[Object]) -> None:
    config = operator_config(objects)
    service = only(objects, "Service")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    port, metrics, *_ = service["spec"]["ports"]
    scheme = "https" if config.tls else "http"
    assert config.control.url == f"{scheme}://{name}.{namespace}.svc:{port['port']}"
    (container,) = pod_template(objects)["spec"]["containers"]
    (target,) = (p for p in container["ports"] if p["name"] == port["targetPort"])
    assert target["containerPort"] == config.control.port
    (target,) = (p for p in container["ports"] if p["name"] == metrics["targetPort"])
    assert target["containerPort"] == metrics["port"] == config.metrics_port
    assert (
        pod_template(objects)["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    )


def test_control_pod_labels_match_operator_pods(objects: list[Object]) -> None:
    config = operator_config(objects)
    assert config.control.namespace == "faasmoe-system"
    assert pod_template(objects)["metadata"]["labels"].items() >= config.control.pod_labels.items()


def test_pod_is_restricted_and_mounts_token_explicitly(objects: list[Object]) -> None:
    spec = pod_template(objects)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    (volume,) = (v for v in spec["volumes"] if v["name"] == mounts[folder])
    token, certificate, namespace = volume["projected"]["sources"]
    assert token["serviceAccountToken"]["path"] == "token"
    assert certificate["configMap"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert namespace["downwardAPI"]["items"][0]["path"] == "namespace"


def test_network_policy_allows_routers_in_and_sandboxes_out(
    rendered: dict[str, list[Object]],
) -> None:
    policy, ctx = network_policy(rendered["everything"]), make_context()
    router = pod_template(serving_objects(ctx))["metadata"]["labels"]
    sandbox = sandbox_pod(ctx, name="x")["metadata"]["labels"]
    incoming, scrapers, _ = policy["ingress"]
    assert scrapers["ports"] == [{"port": 9444, "protocol": "TCP"}]
    assert scrapers["from"] == [MONITORING]
    peers = [peer["podSelector"]["matchLabels"] for peer in incoming["from"][:2]]
    assert router.items() >= peers[0].items()
    assert not sandbox.items() >= peers[0].items()
    assert incoming["ports"] == [{"port": 9443, "protocol": "TCP"}]
    _, to_sandboxes, to_api = policy["egress"]
    (peer,) = to_sandboxes["to"]
    assert sandbox.items() >= peer["podSelector"]["matchLabels"].items()
    assert to_sandboxes["ports"] == [{"port": SANDBOX_PORT, "protocol": "TCP"}]
    assert to_api["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert to_api["ports"] == [{"port": 6443, "protocol": "TCP"}]


def test_without_peers_nobody_scrapes(helm: Helm) -> None:
    policy = network_policy(helm.template({"networkPolicy": {"metricsFrom": []}}))
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == [8090]


@pytest.mark.parametrize(
    ("values", "apis", "user"),
    [
        ({}, [], 65532),
        ({"models": {"runAsUser": 1000}}, [], 1000),
        ({"models": {"runAsUser": None}}, [], None),
        ({}, ["security.openshift.io/v1"], None),
        ({"openshift": True}, [], None),
        ({"openshift": False}, ["security.openshift.io/v1"], 65532),
    ],
)
def test_user_of_pods_is_fixed_or_the_platforms(
    helm: Helm, values: Object, apis: list[str], user: int | None
) -> None:
    objects = helm.template(values, apis=apis)
    assert operator_config(objects).run_as_user == user
    templates = [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "Job")]
    assert len(templates) == 2  # the operator and the chart's test
    is_openshift = (bool(apis) and values.get("openshift") is not False) or values.get("openshift")
    ids = {"runAsUser", "runAsGroup", "fsGroup"}
    for own in (template["spec"]["securityContext"] for template in templates):
        assert ids & set(own) == (set() if is_openshift else ids)
        assert own["runAsNonRoot"] is True


def test_helm_test_may_reach_control_api(
    rendered: dict[str, list[Object]],
) -> None:
    test = only(rendered["everything"], "Job")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = test["spec"]["template"]["spec"]["containers"]
    assert f"{operator_config(rendered['everything']).control.url}/readyz" in container["args"][0]
    incoming, *_ = network_policy(rendered["everything"])["ingress"]
    allowed_labels = incoming["from"][1]["podSelector"]["matchLabels"]
    labels = test["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= allowed_labels.items()
    assert (
        not allowed_labels.items()
        <= pod_template(rendered["everything"])["metadata"]["labels"].items()
    )


@pytest.mark.parametrize(
    ("image", "registry", "expected"),
    [
        ({}, "", f"faasmoe/operator:{VERSION}"),
        ({"tag": "1.0"}, "", "faasmoe/operator:1.0"),
        ({}, "mirror.example.com", f"mirror.example.com/faasmoe/operator:{VERSION}"),
        (
            {"registry": "own.example.com:5000"},
            "x",
            f"own.example.com:5000/faasmoe/operator:{VERSION}",
        ),
        (
            {"tag": "1.0", "digest": f"sha256:{'0' * 64}"},
            "",
            f"faasmoe/operator@sha256:{'0' * 64}",
        ),
    ],
)
def test_image_name(helm: Helm, image: dict[str, str], registry: str, expected: str) -> None:
    objects = helm.template({"image": image, "global": {"imageRegistry": registry}})
    (container,) = pod_template(objects)["spec"]["containers"]
    assert container["image"] == expected


def test_object_names(rendered: dict[str, list[Object]]) -> None:
    assert only(rendered["default"], "Deployment")["metadata"]["name"] == "faasmoe-operator"
    assert only(rendered["everything"], "Deployment")["metadata"]["name"] == "our-moe-operator"
    extra = {
        obj["metadata"]["name"]
        for obj in rendered["everything"]
        if obj.get("data") == {"hello": "world"}
    }
    assert extra == {"our-moe-more", "faasmoe-text"}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://otel.monitoring.svc:4318", 4318), ("https://otel.example.com/otlp", 443)],
)
def test_traces_reach_their_collector(helm: Helm, endpoint: str, port: int) -> None:
    tracing = {"otlpEndpoint": endpoint, "samplingRatio": 0.5}
    objects = helm.template({"tracing": tracing, "networkPolicy": {"enabled": True}})
    (container,) = pod_template(objects)["spec"]["containers"]
    env = {v["name"]: v.get("value") for v in container["env"]}
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == endpoint
    assert env["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    egress = network_policy(objects)["egress"]
    assert {"ports": [{"port": port, "protocol": "TCP"}]} in egress


def test_nothing_is_traced_by_default(rendered: dict[str, list[Object]]) -> None:
    for objects in rendered.values():
        (container,) = pod_template(objects)["spec"]["containers"]
        assert not [v for v in container["env"] if v["name"].startswith("OTEL_")]
