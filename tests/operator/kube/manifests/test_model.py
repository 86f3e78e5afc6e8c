"""Properties that hold for every object of every case."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schemas import check_schema
from security_checks import failed_checks

from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.types import OWNED_KINDS, POD, Object, kind_of

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for obj in objects:
        if obj["kind"] == "Pod":
            yield obj["metadata"]["name"], obj
        elif "template" in obj.get("spec", {}):
            yield obj["metadata"]["name"], obj["spec"]["template"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        for container in pod["spec"]["containers"]:
            yield name, container


def test_every_object_is_valid_for_its_kubernetes_schema(objects: list[Object]) -> None:
    for obj in objects:
        check_schema(obj)


def test_every_kind_is_known(objects: list[Object]) -> None:
    assert {kind_of(obj) for obj in objects} <= {*OWNED_KINDS, POD}


def test_names_are_unique_within_a_kind(objects: list[Object]) -> None:
    names = Counter((obj["kind"], obj["metadata"]["name"]) for obj in objects)
    assert [name for name, count in names.items() if count > 1] == []


def test_names_and_labels_are_within_kubernetes_limits(objects: list[Object]) -> None:
    for obj in objects:
        assert NAME.fullmatch(obj["metadata"]["name"])
        if obj["kind"] == "Service":
            assert obj["metadata"]["name"][0].isalpha()
    labels = [obj["metadata"]["labels"] for obj in objects]
    labels += [pod["metadata"]["labels"] for _, pod in pods(objects)]
    for key, value in (item for some in labels for item in some.items()):
        assert LABEL_VALUE.fullmatch(value), f"{key}: {value}"


def test_every_object_has_the_model_labels(
    objects: list[Object], any_context: ModelContext
) -> None:
    expected = {
        "app.kubernetes.io/name": "faasmoe",
        "app.kubernetes.io/instance": any_context.name,
        "app.kubernetes.io/part-of": "faasmoe",
        "app.kubernetes.io/managed-by": "faasmoe-operator",
        "faasmoe.dev/model": any_context.name,
    }
    metadata = [obj["metadata"] for obj in objects]
    metadata += [pod["metadata"] for _, pod in pods(objects)]
    for some in metadata:
        assert some["labels"].items() >= expected.items()


def test_every_object_is_owned_except_a_retained_claim(
    objects: list[Object], any_context: ModelContext
) -> None:
    owner = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "name": any_context.name,
        "uid": "u-1",
        "controller": True,
        "blockOwnerDeletion": True,
    }
    retained = any_context.spec.store.reclaim_policy == "Retain"
    for obj in objects:
        kept = retained and obj["kind"] == "PersistentVolumeClaim"
        assert obj["metadata"].get("ownerReferences") == (None if kept else [owner])
        assert obj["metadata"]["namespace"] == "llm"


def test_every_pod_complies_with_the_restricted_standard(objects: list[Object]) -> None:
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for _, pod in pods(objects):
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 10_000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert {next(iter(v.keys() - {"name"})) for v in spec["volumes"]} <= allowed
    for _, container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context["runAsNonRoot"] is True


def test_no_pod_mounts_an_api_token(objects: list[Object]) -> None:
    accounts = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ServiceAccount"}
    used = [pod["spec"] for _, pod in pods(objects)]
    assert {spec["serviceAccountName"] for spec in used} == set(accounts)
    assert all(spec["automountServiceAccountToken"] is False for spec in used)
    assert all(spec["enableServiceLinks"] is False for spec in used)
    assert all(a["automountServiceAccountToken"] is False for a in accounts.values())


def test_requests_never_exceed_limits(objects: list[Object]) -> None:
    for _, container in containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert {"cpu", "memory"} <= resources["limits"].keys()


def test_mounts_have_volumes_and_variables_are_unique(
    objects: list[Object],
) -> None:
    for _, pod in pods(objects):
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        (container,) = pod["spec"]["containers"]
        assert sorted(volumes) == sorted(m["name"] for m in container["volumeMounts"])
        variables = Counter(variable["name"] for variable in container["env"])
        assert max(variables.values()) == 1


def test_every_selector_matches_exactly_its_pods(objects: list[Object]) -> None:
    by_component = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["metadata"]["labels"]
        for _, pod in pods(objects)
    }
    for obj in objects:
        selector = _selector(obj)
        if selector is None:
            continue
        component = obj["metadata"]["labels"].get("app.kubernetes.io/component")
        found = {c for c, labels in by_component.items() if labels.items() >= selector.items()}
        assert found == ({component} if component else set(by_component))


def _selector(obj: Object) -> dict[str, Any] | None:
    spec = obj.get("spec", {})
    match obj["kind"]:
        case "Service":
            selector: dict[str, Any] = spec["selector"]
        case "Deployment" | "PodDisruptionBudget":
            selector = spec["selector"]["matchLabels"]
        case "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        case _:
            return None
    return selector


def test_checkov_reports_no_unexplained_failure(
    rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    for name, objects in rendered.items():
        with (tmp_path / f"{name}.yaml").open("w") as file:
            yaml.safe_dump_all(objects, file)
    assert failed_checks(tmp_path, framework="kubernetes") == []


@pytest.mark.parametrize("framework", ["kubernetes"])
def test_checkov_reports_a_known_failure(framework: str, tmp_path: Path) -> None:
    container = {"name": "one", "image": "some:1", "securityContext": {"privileged": True}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad", "namespace": "llm"},
        "spec": {"containers": [container]},
    }
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    failed = failed_checks(tmp_path, framework=framework)
    assert [check for check in failed if check.startswith("CKV_K8S_16 ")]
