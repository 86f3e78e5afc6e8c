"""The operator's pod: what it is told, what it may do, and how it is reached."""

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
FIELDS = {"metadata.namespace": "faasmoe-system", "metadata.name": "faasmoe-operator-x-y"}


def only(objects: list[Object], kind: str) -> Any:
    (found,) = (obj for obj in objects if obj["kind"] == kind)
    return found


def pod_template(objects: list[Object]) -> Any:
    return only(objects, "Deployment")["spec"]["template"]


def network_policy(objects: list[Object]) -> Any:
    """Return what holds for the operator's pods."""
    labels = pod_template(objects)["metadata"]["labels"]
    (found,) = (
        obj["spec"]
        for obj in objects
        if obj["kind"] == "NetworkPolicy"
        and labels.items() >= obj["spec"]["podSelector"]["matchLabels"].items()
    )
    return found


def operator_config(objects: list[Object]) -> OperatorConfig:
    """Return the settings as the operator reads them in its pod."""
    (container,) = pod_template(objects)["spec"]["containers"]
    env = {
        v["name"]: v["value"] if "value" in v else FIELDS[v["valueFrom"]["fieldRef"]["fieldPath"]]
        for v in container["env"]
    }
    return OperatorConfig.from_env(env)


def test_the_operator_understands_all_that_it_is_told(rendered: dict[str, list[Object]]) -> None:
    read = operator_config(rendered["everything"])
    assert read.namespace == "faasmoe-system"
    assert read.identity == "faasmoe-operator-x-y"
    assert read.watch_namespaces == ()
    assert read.images.router == "registry.example.com/mirror/llm/router:1.2.3"
    assert read.images.expert == "gpu.example.com/faasmoe/expert:1.2.3-cuda"
    assert read.images.pull_policy == "Always"
    assert read.images.pull_secrets == ("mirror", "gpu")
    assert read.root_key_secret == "our-moe-root-key"
    assert read.leader_election is True
    assert (read.workers, read.log_format, read.log_level) == (16, "text", "DEBUG")
    assert read.control.port == 9443


def test_tells_every_setting_that_there_is(rendered: dict[str, list[Object]]) -> None:
    (container,) = pod_template(rendered["default"])["spec"]["containers"]
    told = {variable["name"] for variable in container["env"]}
    assert told == {f"{PREFIX}{name}" for name in settings_read()}


def settings_read() -> set[str]:
    """Return the names that the operator looks up in its environment."""
    names: set[str] = set()

    class Recorder(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            names.add(key.removeprefix(PREFIX))
            return super().get(key, default)

    images = {f"{PREFIX}ROUTER_IMAGE": "a:1", f"{PREFIX}EXPERT_IMAGE": "b:1"}
    OperatorConfig.from_env(Recorder(images))
    return names


def test_by_default_it_looks_after_all_namespaces_alone(
    rendered: dict[str, list[Object]],
) -> None:
    read = operator_config(rendered["default"])
    assert read.watch_namespaces == ()
    assert read.leader_election is False
    assert only(rendered["default"], "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_looks_after_the_namespaces_in_which_it_has_a_role(
    rendered: dict[str, list[Object]],
) -> None:
    read = operator_config(rendered["namespaced"])
    assert read.watch_namespaces == ("llm", "research")
    assert read.leader_election is True
    strategy = only(rendered["namespaced"], "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate"}


def test_routers_reach_the_control_api_by_its_service(objects: list[Object]) -> None:
    read = operator_config(objects)
    service = only(objects, "Service")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    (port,) = service["spec"]["ports"]
    assert read.control.url == f"http://{name}.{namespace}.svc:{port['port']}"
    (container,) = pod_template(objects)["spec"]["containers"]
    (target,) = (p for p in container["ports"] if p["name"] == port["targetPort"])
    assert target["containerPort"] == read.control.port
    assert (
        pod_template(objects)["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    )


def test_models_policies_name_the_operators_pods(objects: list[Object]) -> None:
    read = operator_config(objects)
    assert read.control.namespace == "faasmoe-system"
    assert pod_template(objects)["metadata"]["labels"].items() >= read.control.pod_labels.items()


def test_is_restricted_and_only_its_container_gets_the_token(objects: list[Object]) -> None:
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


def test_its_network_policy_lets_routers_in_and_sandboxes_out(
    rendered: dict[str, list[Object]],
) -> None:
    policy, ctx = network_policy(rendered["everything"]), make_context()
    router = pod_template(serving_objects(ctx))["metadata"]["labels"]
    sandbox = sandbox_pod(ctx, name="x")["metadata"]["labels"]
    (incoming,) = policy["ingress"]
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


def test_the_helm_test_asks_the_control_api_and_gets_through(
    rendered: dict[str, list[Object]],
) -> None:
    test = only(rendered["everything"], "Job")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = test["spec"]["template"]["spec"]["containers"]
    assert f"{operator_config(rendered['everything']).control.url}/readyz" in container["args"][0]
    (incoming,) = network_policy(rendered["everything"])["ingress"]
    let_through = incoming["from"][1]["podSelector"]["matchLabels"]
    labels = test["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= let_through.items()
    assert (
        not let_through.items()
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
def test_names_its_image(helm: Helm, image: dict[str, str], registry: str, expected: str) -> None:
    objects = helm.template({"image": image, "global": {"imageRegistry": registry}})
    (container,) = pod_template(objects)["spec"]["containers"]
    assert container["image"] == expected


def test_names_grow_from_the_release(rendered: dict[str, list[Object]]) -> None:
    assert only(rendered["default"], "Deployment")["metadata"]["name"] == "faasmoe-operator"
    assert only(rendered["everything"], "Deployment")["metadata"]["name"] == "our-moe-operator"
    extra = {
        obj["metadata"]["name"]
        for obj in rendered["everything"]
        if obj.get("data") == {"hello": "world"}
    }
    assert extra == {"our-moe-more", "faasmoe-text"}
