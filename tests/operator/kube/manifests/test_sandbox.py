from dataclasses import replace
from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_expert.config import SandboxConfig
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube.manifests import (
    ControlSecrets,
    Images,
    ModelContext,
    sandbox_pod,
    sandbox_template_hash,
)

NAME = "qwen-sandbox-abcde"


def environment(ctx: ModelContext) -> dict[str, Any]:
    variables = sandbox_pod(ctx, name=NAME)["spec"]["containers"][0]["env"]
    return {variable["name"]: variable for variable in variables}


def test_sandbox_accepts_its_environment() -> None:
    experts = {"device": "cpu", "threads": 4, "functionsPerSandbox": 3}
    variables = environment(make_context({"experts": experts}))
    config = SandboxConfig.from_env({k: v["value"] for k, v in variables.items() if "value" in v})
    assert (config.host, config.port) == ("0.0.0.0", 9090)
    assert (config.device, config.threads, config.capacity) == ("cpu", 4, 3)


def test_sandbox_has_its_name_and_the_token() -> None:
    variables = environment(make_context())
    assert variables["FAASMOE_SANDBOX_ID"]["valueFrom"]["fieldRef"] == {
        "fieldPath": "metadata.name"
    }
    reference = variables["FAASMOE_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference["key"] == "token"
    assert reference["name"].startswith("qwen-control-")


def test_a_new_sandbox_is_generic() -> None:
    labels = sandbox_pod(make_context(), name=NAME)["metadata"]["labels"]
    assert labels["faasmoe.dev/pool"] == "warm"
    assert labels["app.kubernetes.io/component"] == "sandbox"
    assert "faasmoe.dev/function" not in labels


def test_template_hash_does_not_depend_on_the_name() -> None:
    pods = [sandbox_pod(make_context(), name=name) for name in ("one", "two")]
    hashes = {pod["metadata"]["labels"]["faasmoe.dev/template"] for pod in pods}
    assert hashes == {sandbox_template_hash(make_context())}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"experts": {"threads": 2}}, id="threads"),
        pytest.param({"experts": {"functionsPerSandbox": 2}}, id="capacity"),
        pytest.param({"experts": {"device": "cuda"}}, id="device"),
        pytest.param({"granularity": {"expertsPerFunction": 30}}, id="memory"),
        pytest.param({"store": {"accessMode": "ReadWriteMany"}}, id="node"),
        pytest.param({"experts": {"template": {"image": "own:1"}}}, id="image"),
        pytest.param({"experts": {"template": {"labels": {"team": "a"}}}}, id="labels"),
        pytest.param({"experts": {"template": {"annotations": {"a": "b"}}}}, id="annotations"),
    ],
)
def test_template_hash_changes_with_the_pod(spec: dict[str, Any]) -> None:
    assert sandbox_template_hash(make_context(spec)) != sandbox_template_hash(make_context())


def test_template_hash_changes_with_image_and_token() -> None:
    ctx = make_context()
    others = [
        replace(ctx, images=Images("faasmoe/router:0.2.0", "other:1")),
        replace(ctx, secrets=ControlSecrets("another", "00")),
    ]
    assert len({sandbox_template_hash(c) for c in (ctx, *others)}) == 3


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"router": {"replicas": 3, "maxNumSeqs": 8}}, id="router"),
        pytest.param({"experts": {"warmPool": 5}}, id="pool"),
        pytest.param({"experts": {"scaling": {"maxScale": 2}}}, id="scaling"),
        pytest.param({"suspend": True}, id="suspend"),
        pytest.param({"tenants": [{"name": "a", "apiKeysSecretRef": {"name": "b"}}]}, id="tenants"),
    ],
)
def test_unrelated_fields_do_not_replace_sandboxes(spec: dict[str, Any]) -> None:
    assert sandbox_template_hash(make_context(spec)) == sandbox_template_hash(make_context())


def test_a_changed_router_image_does_not_replace_sandboxes() -> None:
    ctx = make_context()
    other = replace(ctx, images=Images("router:2", ctx.images.expert), generation=9)
    assert sandbox_template_hash(other) == sandbox_template_hash(ctx)


def test_sandbox_is_never_restarted() -> None:
    assert sandbox_pod(make_context(), name=NAME)["spec"]["restartPolicy"] == "Never"


def test_rejects_an_invalid_granularity() -> None:
    ctx = make_context({"granularity": {"expertsPerFunction": 61}})
    with pytest.raises(PlanError, match="expertsPerFunction: got 61, expected at most 60"):
        sandbox_pod(ctx, name=NAME)
