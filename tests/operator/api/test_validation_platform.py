from typing import Any

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.validation import (
    kubernetes_problems,
    process_platform_problems,
    process_platform_warnings,
)


def model(**spec: Any) -> MoEModel:
    head = {"apiVersion": "faasmoe.dev/v1alpha1", "kind": "MoEModel", "metadata": {"name": "demo"}}
    spec = {"model": {"source": "hf://org/name"}, **spec}
    return MoEModel.model_validate({**head, "spec": spec})


def warned_fields(**spec: Any) -> list[str]:
    return [warning.partition(":")[0] for warning in process_platform_warnings(model(**spec))]


def test_common_fields_cause_no_warning() -> None:
    assert (
        warned_fields(router={"maxWaiting": 1}, experts={"warmPool": 0}, store={"path": "x"}) == []
    )


def test_warns_about_every_field_of_kubernetes() -> None:
    token = {"name": "hub", "key": "token"}
    fields = warned_fields(
        model={"source": "hf://org/name", "tokenSecretRef": token},
        store={
            "size": "1Gi",
            "claimName": "a",
            "subPath": "b",
            "reclaimPolicy": "Retain",
            "resources": {"requests": {"cpu": 2}},
        },
        router={"replicas": 2, "template": {"nodeSelector": {"a": "b"}}},
        experts={"template": {"image": "x"}},
        tenants=[{"name": "a", "apiKeysPath": "k", "apiKeysSecretRef": {"name": "s"}}],
        networking={"ingress": {"host": "a.b"}},
        monitoring={"serviceMonitor": {}},
        suspend=True,
    )
    assert fields == [
        "spec.model.tokenSecretRef",
        "spec.store.size",
        "spec.store.claimName",
        "spec.store.subPath",
        "spec.store.reclaimPolicy",
        "spec.store.resources",
        "spec.router.replicas",
        "spec.router.template",
        "spec.experts.template",
        "spec.tenants.0.apiKeysSecretRef",
        "spec.networking",
        "spec.monitoring",
        "spec.suspend",
    ]


def test_warns_about_one_function_per_sandbox_on_a_gpu() -> None:
    (warning,) = process_platform_warnings(model(experts={"device": "cuda"}))
    assert warning.startswith("spec.experts.functionsPerSandbox: got 1 with device cuda: ")
    assert warned_fields(experts={"device": "cuda", "functionsPerSandbox": 24}) == []
    assert (
        warned_fields(experts={"device": "cpu"}) == warned_fields(router={"device": "cuda"}) == []
    )


def test_explicit_defaults_cause_no_warning() -> None:
    assert warned_fields(suspend=False, router={"replicas": 1, "template": {}}) == []


def test_only_the_process_platform_requires_a_folder_of_api_keys() -> None:
    tenants = [{"name": "a", "apiKeysSecretRef": {"name": "keys"}}]
    (problem,) = process_platform_problems(model(tenants=tenants))
    assert problem.startswith("spec.tenants.0.apiKeysPath: missing")
    assert kubernetes_problems(model(tenants=tenants)) == []


def test_only_kubernetes_requires_a_secret_of_api_keys() -> None:
    with_folder = model(tenants=[{"name": "a", "apiKeysPath": "keys"}])
    assert process_platform_problems(with_folder) == []
    assert [problem.partition(":")[0] for problem in kubernetes_problems(with_folder)] == [
        "spec.tenants.0.apiKeysPath",
        "spec.tenants.0.apiKeysSecretRef",
    ]


def test_sources_are_rejected_by_the_other_platform() -> None:
    claim, folder = model(model={"source": "pvc://a/b"}), model(model={"source": "file:///b"})
    assert len(process_platform_problems(claim)) == len(kubernetes_problems(folder)) == 1
    assert process_platform_problems(folder) == kubernetes_problems(claim) == []
