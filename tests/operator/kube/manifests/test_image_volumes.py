"""Checkpoints and stores in OCI artifacts are mounted as image volumes."""

from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
from model_contexts import all_objects, make_context

from faasmoe_operator.kube.manifests import ModelContext, store_objects
from faasmoe_operator.kube.types import Object

IMAGE = "registry.example.com/stores/qwen:1"
STORE = {"store": {"source": f"oci://{IMAGE}"}}
CHECKPOINT = {"model": {"source": f"oci://{IMAGE}"}}
FIRST_VERSION = "1.33"


def pods(ctx: ModelContext) -> dict[str, Any]:
    found = {}
    for obj in all_objects(ctx):
        if obj["kind"] == "Pod":
            found["Sandbox"] = obj["spec"]
        elif obj["kind"] in ("Job", "Deployment"):
            found[obj["kind"]] = obj["spec"]["template"]["spec"]
    return found


def volume(pod: Any, name: str) -> Object:
    (found,) = (v for v in pod["volumes"] if v["name"] == name)
    return {key: value for key, value in found.items() if key != "name"}


def mount(pod: Any, name: str) -> Object:
    mounts: list[Object] = pod["containers"][0]["volumeMounts"]
    (found,) = (m for m in mounts if m["name"] == name)
    return found


def test_every_pod_mounts_the_store_of_an_image_read_only() -> None:
    expected = {"image": {"reference": IMAGE, "pullPolicy": "IfNotPresent"}}
    found = pods(make_context(STORE))
    assert found.keys() == {"Job", "Deployment", "Sandbox"}
    for pod in found.values():
        assert volume(pod, "store") == expected
        assert mount(pod, "store") == {"name": "store", "mountPath": "/store", "readOnly": True}


def test_a_store_in_an_image_needs_no_claim_and_no_node() -> None:
    ctx = make_context(STORE)
    assert "PersistentVolumeClaim" not in {o["kind"] for o in store_objects(ctx)}
    assert all("podAffinity" not in pod.get("affinity", {}) for pod in pods(ctx).values())


def test_the_job_accepts_the_store_of_an_image_and_prepares_none() -> None:
    from faasmoe_router.checkpoint.__main__ import _parser

    pod = pods(make_context(STORE))["Job"]
    arguments = _parser().parse_args(["prepare", *pod["containers"][0]["args"]])
    assert arguments.existing
    assert arguments.source == "hf://Qwen/Qwen1.5-MoE-A2.7B"
    assert (str(arguments.store), arguments.discard_download) == ("/store", None)
    names = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert names["HF_HUB_OFFLINE"] == "1"


def test_a_store_may_lie_in_a_folder_of_an_image() -> None:
    ctx = make_context({"store": {"source": f"oci://{IMAGE}", "subPath": "models/qwen"}})
    assert "/store/models/qwen" in pods(ctx)["Job"]["containers"][0]["args"]


def test_the_job_alone_mounts_the_checkpoint_of_an_image() -> None:
    found = pods(make_context(CHECKPOINT))
    job = found.pop("Job")
    assert volume(job, "source")["image"]["reference"] == IMAGE
    path = mount(job, "source")["mountPath"]
    args = job["containers"][0]["args"]
    assert (args[0], mount(job, "source")["readOnly"]) == (path, True)
    assert "--discard-download" not in args
    assert not any(v["name"] == "source" for pod in found.values() for v in pod["volumes"])


def test_objects_are_valid_where_image_volumes_are_known() -> None:
    for spec in (STORE, CHECKPOINT):
        for obj in all_objects(make_context(spec)):
            if obj["kind"] in ("Job", "Deployment", "Pod"):
                kubernetes_validate.validate(obj, FIRST_VERSION, strict=True)
