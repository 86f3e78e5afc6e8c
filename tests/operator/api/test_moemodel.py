from types import MappingProxyType
from typing import Any

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError


def stored_object(**spec: Any) -> dict[str, Any]:
    """Return a MoEModel as the API server returns it."""
    return {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {
            "name": "demo",
            "namespace": "llm",
            "uid": "1d78bc7e-9993-4d84-84cb-49d67c7ae7b9",
            "generation": 3,
            "resourceVersion": "1047",
            "creationTimestamp": "2026-11-25T21:25:13Z",
            "labels": {"team": "a"},
            "managedFields": [{"manager": "kubectl"}],
            "finalizers": ["x/y"],
        },
        "spec": {"model": {"source": "hf://org/name"}, **spec},
        "status": {"observedGeneration": 3},
    }


def test_from_object_ignores_fields_of_the_api_server() -> None:
    model = MoEModel.from_object(stored_object())
    assert (model.metadata.namespace, model.metadata.name) == ("llm", "demo")
    assert model.metadata.labels == {"team": "a"}
    assert model.spec.model.source == "hf://org/name"


def test_from_object_accepts_any_mappings_and_sequences() -> None:
    obj = stored_object(tenants=({"name": "a", "apiKeysSecretRef": {"name": "keys"}},))
    frozen = MappingProxyType({key: _freeze(value) for key, value in obj.items()})
    assert MoEModel.from_object(frozen) == MoEModel.from_object(obj)


def test_to_object_round_trips() -> None:
    model = MoEModel.from_object(stored_object(router={"kvCacheMemory": "2Gi", "replicas": 2}))
    assert MoEModel.from_object(model.to_object()) == model


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        pytest.param(
            {"model": {"source": "file:///x"}},
            "llm/demo: spec.model.source: got 'file:///x', "
            "expected hf://ORG/NAME, pvc://CLAIM/PATH or another source on Kubernetes",
            id="file",
        ),
        pytest.param(
            {"store": {"path": "x"}},
            "llm/demo: spec.store.path: only `faasmoe up` supports it, expected none on Kubernetes",
            id="store-folder",
        ),
        pytest.param(
            {"tenants": [{"name": "a", "apiKeysPath": "k", "apiKeysSecretRef": {"name": "s"}}]},
            "llm/demo: spec.tenants.0.apiKeysPath: only `faasmoe up` supports it, "
            "expected none on Kubernetes",
            id="folder-of-keys",
        ),
        pytest.param(
            {"experts": {"warmPool": -1}},
            "llm/demo: spec.experts.warmPool: got -1, expected 0 or more",
            id="out-of-bounds",
        ),
    ],
)
def test_from_object_rejects_what_kubernetes_cannot_serve(
    spec: dict[str, Any], problem: str
) -> None:
    with pytest.raises(MoEModelError) as caught:
        MoEModel.from_object(stored_object(**spec))
    assert str(caught.value) == problem


def test_from_object_rejects_an_empty_object() -> None:
    with pytest.raises(MoEModelError, match=r"apiVersion: missing\n"):
        MoEModel.from_object({})


@pytest.mark.parametrize(
    ("source", "claim_path"),
    [
        ("pvc://models/qwen/1.5", ("models", "qwen/1.5")),
        ("pvc://models/qwen/", ("models", "qwen")),
        ("pvc://models", ("models", "")),
        ("pvc://models/", ("models", "")),
    ],
)
def test_parses_the_claim_path_of_a_source(source: str, claim_path: tuple[str, str]) -> None:
    parsed = MoEModel.from_object(stored_object(model={"source": source})).spec.model.claim_path
    assert parsed is not None
    assert (parsed.claim, parsed.path) == claim_path


def test_hub_source_has_no_claim_path() -> None:
    assert MoEModel.from_object(stored_object()).spec.model.claim_path is None


def test_store_sub_path_defaults_to_the_models_name() -> None:
    assert MoEModel.from_object(stored_object()).store_sub_path == "demo"
    model = MoEModel.from_object(stored_object(store={"subPath": "models/demo"}))
    assert model.store_sub_path == "models/demo"


def test_converts_the_kv_cache_memory_to_bytes() -> None:
    assert MoEModel.from_object(stored_object()).spec.router.kv_cache_bytes is None
    model = MoEModel.from_object(stored_object(router={"kvCacheMemory": "1.5Gi"}))
    assert model.spec.router.kv_cache_bytes == 3 << 29


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _freeze(entry) for key, entry in value.items()})
    return value
