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


def test_the_sandbox_understands_all_that_it_is_told() -> None:
    experts = {"device": "cpu", "threads": 4, "functionsPerSandbox": 3}
    told = environment(make_context({"experts": experts}))
    config = SandboxConfig.from_env({k: v["value"] for k, v in told.items() if "value" in v})
    assert (config.host, config.port) == ("0.0.0.0", 9090)
    assert (config.device, config.threads, config.capacity) == ("cpu", 4, 3)


def test_knows_its_name_and_the_models_token() -> None:
    told = environment(make_context())
    assert told["FAASMOE_SANDBOX_ID"]["valueFrom"]["fieldRef"] == {"fieldPath": "metadata.name"}
    reference = told["FAASMOE_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference["key"] == "token"
    assert reference["name"].startswith("qwen-control-")


def test_begins_in_the_pool_without_a_function() -> None:
    labels = sandbox_pod(make_context(), name=NAME)["metadata"]["labels"]
    assert labels["faasmoe.dev/pool"] == "warm"
    assert labels["app.kubernetes.io/component"] == "sandbox"
    assert "faasmoe.dev/function" not in labels


def test_carries_the_hash_of_its_template_whatever_its_name() -> None:
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
def test_another_pod_has_another_hash(spec: dict[str, Any]) -> None:
    assert sandbox_template_hash(make_context(spec)) != sandbox_template_hash(make_context())


def test_another_image_or_token_has_another_hash() -> None:
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
def test_what_is_not_in_the_pod_does_not_replace_sandboxes(spec: dict[str, Any]) -> None:
    assert sandbox_template_hash(make_context(spec)) == sandbox_template_hash(make_context())


def test_the_operators_own_images_do_not_replace_sandboxes_when_only_the_router_changes() -> None:
    ctx = make_context()
    other = replace(ctx, images=Images("router:2", ctx.images.expert), generation=9)
    assert sandbox_template_hash(other) == sandbox_template_hash(ctx)


def test_is_not_started_again_once_it_has_ended() -> None:
    assert sandbox_pod(make_context(), name=NAME)["spec"]["restartPolicy"] == "Never"


def test_refuses_a_granularity_that_the_model_cannot_have() -> None:
    ctx = make_context({"granularity": {"expertsPerFunction": 61}})
    with pytest.raises(PlanError, match="expertsPerFunction: got 61, expected at most 60"):
        sandbox_pod(ctx, name=NAME)
