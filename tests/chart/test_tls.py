"""The chart with TLS: what operator and gateways are told, mount and may do."""

from __future__ import annotations

from typing import Any

import pytest
from helm import Helm

from faasmoe_gateway.config import GatewayConfig
from faasmoe_operator.kube.config import OperatorConfig
from faasmoe_operator.kube.manifests.names import MODELS_TLS_SECRET
from faasmoe_operator.kube.types import Object

NAMES = {"operator": "cm-operator", "gateway": "cm-gateway", "models": "cm-models"}
GATEWAY = {"gateway": {"enabled": True}}


def deployment(objects: list[Object], component: str) -> Any:
    [found] = (
        o["spec"]["template"]["spec"]
        for o in objects
        if o["kind"] == "Deployment"
        and o["metadata"]["labels"]["app.kubernetes.io/component"] == component
    )
    return found


def environment(spec: Any) -> dict[str, str]:
    return {v["name"]: str(v.get("value", "a-name")) for v in spec["containers"][0]["env"]}


def operator_config(objects: list[Object]) -> OperatorConfig:
    return OperatorConfig.from_env(environment(deployment(objects, "operator")))


def mounted_secret(spec: Any) -> tuple[str, str] | None:
    """Return the name of the Secret with the certificate, and where it is mounted."""
    secrets = [v["secret"]["secretName"] for v in spec["volumes"] if v["name"] == "tls"]
    mounts = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "tls"]
    assert len(secrets) == len(mounts)
    assert all(mount["readOnly"] for mount in mounts)
    return (secrets[0], mounts[0]["mountPath"]) if secrets else None


def patched_secrets(objects: list[Object]) -> set[str]:
    """Return the names of the Secrets that the operator may patch."""
    rules = [r for o in objects if o["kind"] in ("Role", "ClusterRole") for r in o["rules"]]
    of_secrets = [r for r in rules if "secrets" in r["resources"] and "patch" in r["verbs"]]
    assert all(rule["resourceNames"] for rule in of_secrets)
    return {name for rule in of_secrets for name in rule["resourceNames"]}


def test_is_off_by_default(helm: Helm) -> None:
    objects = helm.template(GATEWAY)
    config = operator_config(objects)
    assert (config.tls, config.models_tls_secret, config.gateway_tls_secret) == (False, None, None)
    assert config.control.url.startswith("http://")
    assert mounted_secret(deployment(objects, "operator")) is None
    assert mounted_secret(deployment(objects, "gateway")) is None
    assert patched_secrets(objects) == {"faasmoe-gateway"}


def test_the_operator_issues_what_gateways_and_models_mount(helm: Helm) -> None:
    objects = helm.template({"tls": {"enabled": True}, **GATEWAY})
    config = operator_config(objects)
    assert config.tls
    assert config.tls_folder is None
    assert config.models_tls_secret == MODELS_TLS_SECRET
    assert config.control.url.startswith("https://")
    gateway = deployment(objects, "gateway")
    assert mounted_secret(gateway) == (config.gateway_tls_secret, "/etc/faasmoe/tls")
    folder = GatewayConfig.from_env(environment(gateway)).tls_folder
    assert str(folder) == "/etc/faasmoe/tls"
    assert mounted_secret(deployment(objects, "operator")) is None
    expected = {"faasmoe-gateway", config.gateway_tls_secret, MODELS_TLS_SECRET}
    assert patched_secrets(objects) == expected


def test_without_gateways_it_may_patch_the_models_secrets_alone(helm: Helm) -> None:
    objects = helm.template({"tls": {"enabled": True}})
    assert operator_config(objects).gateway_tls_secret is None
    assert patched_secrets(objects) == {MODELS_TLS_SECRET}


def test_secrets_of_another_issuer_are_mounted_and_not_written(helm: Helm) -> None:
    objects = helm.template({"tls": {"enabled": True, "secretNames": NAMES}, **GATEWAY})
    config = operator_config(objects)
    operator = deployment(objects, "operator")
    assert mounted_secret(operator) == ("cm-operator", str(config.tls_folder))
    assert mounted_secret(deployment(objects, "gateway")) == ("cm-gateway", "/etc/faasmoe/tls")
    assert (config.models_tls_secret, config.gateway_tls_secret) == ("cm-models", None)
    assert patched_secrets(objects) == {"faasmoe-gateway"}


@pytest.mark.parametrize(("enabled", "scheme"), [(True, "HTTPS"), (False, "HTTP")])
def test_probes_speak_what_the_operator_does(helm: Helm, enabled: bool, scheme: str) -> None:
    objects = helm.template({"tls": {"enabled": enabled}})
    [container] = deployment(objects, "operator")["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == scheme


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tls": {"enabled": True, "secretNames": {"operator": "x"}}},
            "tls.secretNames.models: missing",
        ),
        (
            {"tls": {"enabled": True, "secretNames": {**NAMES, "gateway": ""}}, **GATEWAY},
            "tls.secretNames.gateway: missing",
        ),
        (
            {"tls": {"enabled": False, "secretNames": NAMES}},
            "expected none without tls.enabled",
        ),
        ({"tls": {"enabled": "yes"}}, "tls"),
    ],
)
def test_incomplete_settings_are_refused(helm: Helm, values: dict[str, Any], message: str) -> None:
    assert message in helm.template_error(values)
