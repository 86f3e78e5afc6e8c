from dataclasses import replace
from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests import Images, ModelContext, store_objects
from faasmoe_operator.kube.manifests.pods import checkpoint_source, store_path
from faasmoe_operator.kube.types import Object


def one(objects: list[Object], kind: str) -> Object:
    (found,) = (obj for obj in objects if obj["kind"] == kind)
    return found


def job(ctx: ModelContext) -> Object:
    return one(store_objects(ctx), "Job")


def container(ctx: ModelContext) -> Any:
    return job(ctx)["spec"]["template"]["spec"]["containers"][0]


def environment(ctx: ModelContext) -> dict[str, Object]:
    return {variable["name"]: variable for variable in container(ctx)["env"]}


def test_creates_the_claim_of_the_spec() -> None:
    store = {"size": "40Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"}
    claim = one(store_objects(make_context({"store": store})), "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == "qwen-store"
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "40Gi"}},
        "storageClassName": "fast",
        "volumeMode": "Filesystem",
    }


def test_uses_the_default_storage_class_unless_set() -> None:
    claim = one(store_objects(make_context()), "PersistentVolumeClaim")
    assert "storageClassName" not in claim["spec"]


def test_creates_no_claim_if_one_is_named() -> None:
    ctx = make_context({"store": {"claimName": "models"}})
    objects = store_objects(ctx)
    assert "PersistentVolumeClaim" not in [obj["kind"] for obj in objects]
    volumes = job(ctx)["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"] == {"claimName": "models"}


def test_job_prepares_the_source_into_the_store_folder() -> None:
    ctx = make_context({"model": {"source": "hf://o/m", "revision": "main", "dtype": "float16"}})
    assert container(ctx)["command"] == ["python", "-m", "faasmoe_router.checkpoint", "prepare"]
    assert container(ctx)["args"] == [
        "hf://o/m",
        "/store/qwen",
        *("--termination-log", "/dev/termination-log"),
        *("--mode", "copy"),
        *("--discard-download", "/store/.hub/qwen"),
        *("--revision", "main"),
        *("--dtype", "float16"),
    ]
    assert container(ctx)["terminationMessagePath"] == "/dev/termination-log"
    assert container(ctx)["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_checkpoint_cli_accepts_the_command() -> None:
    from faasmoe_router.checkpoint.__main__ import _parser

    ctx = make_context({"model": {"source": "hf://o/m", "revision": "main", "dtype": "float16"}})
    arguments = _parser().parse_args(["prepare", *container(ctx)["args"]])
    assert arguments.source == "hf://o/m"
    assert str(arguments.store) == store_path(ctx)
    assert str(arguments.termination_log) == "/dev/termination-log"


def test_job_quantises_what_the_spec_names() -> None:
    from faasmoe_router.checkpoint.__main__ import _parser

    spec = {"experts": {"quantization": "int4"}, "router": {"quantization": "int8"}}
    arguments = container(make_context(spec))["args"]
    assert arguments[-4:] == ["--quantize", "int4", "--quantize-router", "int8"]
    parsed = _parser().parse_args(["prepare", *arguments])
    assert (parsed.quantize, parsed.quantize_router) == ("int4", "int8")
    assert "--quantize" not in container(make_context())["args"]


def test_store_folder_follows_sub_path() -> None:
    assert store_path(make_context({"store": {"subPath": "models/mine"}})) == "/store/models/mine"


@pytest.mark.parametrize(
    ("source", "argument"),
    [
        ("pvc://checkpoints/qwen/chat", "/source/checkpoints/qwen/chat"),
        ("pvc://checkpoints", "/source/checkpoints"),
        ("hf://o/m", "hf://o/m"),
    ],
)
def test_checkpoint_source_as_seen_by_the_job(source: str, argument: str) -> None:
    assert checkpoint_source(make_context({"model": {"source": source}})) == argument


def test_mounts_the_claim_of_a_checkpoint_read_only() -> None:
    ctx = make_context({"model": {"source": "pvc://checkpoints/qwen"}})
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container(ctx)["volumeMounts"]}
    assert mounts == {"/store": False, "/source/checkpoints": True, "/tmp": False}
    volumes = {v["name"]: v for v in job(ctx)["spec"]["template"]["spec"]["volumes"]}
    assert volumes["source"]["persistentVolumeClaim"] == {"claimName": "checkpoints"}


def test_hub_token_comes_from_its_secret() -> None:
    model = {"source": "hf://o/m", "tokenSecretRef": {"name": "hub", "key": "token"}}
    variable = environment(make_context({"model": model}))["HF_TOKEN"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert "HF_TOKEN" not in environment(make_context())


def test_downloads_into_the_claim_until_the_store_is_complete() -> None:
    assert environment(make_context())["HF_HOME"]["value"] == "/store/.hub/qwen"
    arguments = container(make_context())["args"]
    assert arguments[arguments.index("--discard-download") + 1] == "/store/.hub/qwen"


def test_keeps_a_checkpoint_in_a_claim() -> None:
    ctx = make_context({"model": {"source": "pvc://checkpoints/qwen"}})
    assert "--discard-download" not in container(ctx)["args"]


def test_job_resources_are_defaults_or_overrides() -> None:
    assert container(make_context())["resources"] == {
        "requests": {"cpu": "1", "memory": "2Gi"},
        "limits": {"cpu": "4", "memory": "16Gi"},
    }
    given = {"requests": {"cpu": "250m"}, "limits": {"memory": "1Gi", "ephemeral-storage": "4Gi"}}
    assert container(make_context({"store": {"resources": given}}))["resources"] == {
        "requests": {"cpu": "250m", "memory": "1Gi"},
        "limits": {"cpu": "4", "memory": "1Gi", "ephemeral-storage": "4Gi"},
    }


def test_additional_environment_cannot_replace_the_hub_token() -> None:
    model = {"source": "hf://o/m", "tokenSecretRef": {"name": "hub", "key": "token"}}
    added = [{"name": "HF_ENDPOINT", "value": "https://mirror"}, {"name": "HF_TOKEN", "value": "x"}]
    variables = environment(make_context({"model": model, "router": {"env": added}}))
    assert variables["HF_ENDPOINT"]["value"] == "https://mirror"
    assert "valueFrom" in variables["HF_TOKEN"]


def test_permanent_failures_fail_the_job_at_once() -> None:
    spec = job(make_context())["spec"]
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert fail == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "prepare", "operator": "In", "values": [2]},
    }
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 3
    assert not {"activeDeadlineSeconds", "ttlSecondsAfterFinished"} & spec.keys()


def test_job_uses_the_router_template_with_its_own_resources() -> None:
    template = {
        "nodeSelector": {"pool": "big"},
        "image": "own:1",
        "resources": {"limits": {"memory": "1Gi"}},
    }
    ctx = make_context({"router": {"device": "cuda", "template": template}})
    assert job(ctx)["spec"]["template"]["spec"]["nodeSelector"] == {"pool": "big"}
    assert container(ctx)["image"] == "own:1"
    assert container(ctx)["resources"]["limits"] == {"cpu": "4", "memory": "16Gi"}


def test_template_label_changes_exactly_with_the_pod() -> None:
    def label(ctx: ModelContext) -> str:
        text: str = job(ctx)["metadata"]["labels"]["faasmoe.dev/template"]
        return text

    ctx = make_context()
    assert label(ctx) == label(replace(ctx, generation=2, summary=None))
    assert label(ctx) == label(make_context({"router": {"replicas": 3}}))
    assert label(ctx) != label(replace(ctx, images=Images("other:1", "faasmoe/expert:0.2.0")))


def test_job_is_suspended_with_the_model_until_it_has_succeeded() -> None:
    assert job(make_context({"suspend": True}, summary=None))["spec"]["suspend"] is True
    assert job(make_context({"suspend": True}))["spec"]["suspend"] is False
    assert job(make_context(summary=None))["spec"]["suspend"] is False
