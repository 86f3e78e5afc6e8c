"""TLS between pods with certificates of another issuer, which replaces them and its authority."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from apiserver import ApiServer, Object, eventually
from helm import Helm
from moemodels import make_secret, make_tenant, wait_for_condition
from pod_chat import CHAT, PROMPT, pod_chat
from pod_runner import PodRunner
from real_nodes import ProjectImages
from release import NAME, Release, installed_release, make_known, node_values
from tls_probe import Servers, tls_secret, wait_for_certificate

from faasmoe_contracts.tls import GATEWAY_NAME, OPERATOR_NAME, models_name
from faasmoe_operator.kube.certificates import IssuedCertificate, issue_certificate

pytestmark = pytest.mark.timeout(1200)  # kubelets bring changed Secrets within two minutes

READY_S = 300.0
KEY = "sk-tests-acme"
SECRET_NAMES = {"operator": "operator-tls", "gateway": "gateway-tls", "models": "models-tls"}
OLD, NEW = b"1" * 32, b"2" * 32


def issue(authority: bytes, name: str) -> IssuedCertificate:
    return issue_certificate(authority, name, [name], time.time())


def certificate_secret(part: str, namespace: str, *, authority: bytes, name: str) -> Object:
    """Return the Secret of one part, which trusts the old authority and the new one."""
    issued = issue(authority, name)
    trusted = issue(OLD, name).authorities + issue(NEW, name).authorities
    files = {"tls.crt": issued.certificate, "tls.key": issued.key, "ca.crt": trusted}
    return tls_secret(SECRET_NAMES[part], namespace, files)


@pytest.fixture(scope="module")
def release(
    api: ApiServer, host: str, images: ProjectImages, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    """The chart with gateways and certificates that it does not issue."""
    api.apply("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAME}})
    for part, name in (("operator", OPERATOR_NAME), ("gateway", GATEWAY_NAME)):
        api.apply("secrets", certificate_secret(part, NAME, authority=OLD, name=name))
    values = node_values(images, host)
    values |= {
        "tls": {"enabled": True, "secretNames": SECRET_NAMES},
        "gateway": {**values["gateway"], "enabled": True, "replicas": 2},
    }
    helm = Helm.from_package(tmp_path_factory.mktemp("helm"))
    with installed_release(Release(api, helm), values) as release:
        yield release


def test_no_request_fails_while_certificates_and_their_authority_are_replaced(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace = programs.namespace
    parts = {
        ("operator", NAME): OPERATOR_NAME,
        ("gateway", NAME): GATEWAY_NAME,
        ("models", namespace): models_name(namespace),
    }
    models = certificate_secret("models", namespace, authority=OLD, name=models_name(namespace))
    api.apply("secrets", models)
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    api.create("moemodels", tiny_model("tiny", experts={"scaling": {"windowSeconds": 900}}))
    api.create("tenants", make_tenant("acme", namespace, models=[{"name": "tiny"}]))
    wait_for_condition(api, namespace, "acme", "Ready", plural="tenants", timeout_s=READY_S)
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    url = release.gateway_url()
    text = pod_chat(programs, url, key=KEY)
    servers = Servers.of(api, release, namespace, "tiny")
    wait_for_certificate(programs, [servers.operator], issue(OLD, OPERATOR_NAME).certificate)
    programs.start("traffic", CHAT, url, "tiny", KEY, PROMPT, "stop")

    for (part, where), name in parts.items():
        api.apply("secrets", certificate_secret(part, where, authority=NEW, name=name))
    of_operator = [servers.operator, servers.gateway_link]
    wait_for_certificate(programs, of_operator, issue(NEW, OPERATOR_NAME).certificate)
    of_models = [servers.router, servers.sandbox]
    wait_for_certificate(programs, of_models, issue(NEW, models_name(namespace)).certificate)
    make_known(api, namespace, "stop")
    result = json.loads(programs.wait_for_termination_message("traffic"))
    assert result["errors"] == []
    assert set(result["texts"]) == {text}
    assert result["texts"][text] > 5
    print(f"certificates and authority replaced: {result['texts'][text]} requests, 0 failed")
    assert Servers.of(api, release, namespace, "tiny") == servers  # no pod was replaced
    api.delete("tenants", namespace, "acme")
    eventually(lambda: api.find("tenants", namespace, "acme"), lambda found: found is None)
