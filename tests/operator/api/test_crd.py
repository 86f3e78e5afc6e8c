from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.crd import CRD_FILE_NAME, build_crd, render_crd_yaml
from faasmoe_operator.kube.store_summary import LayerGroup, StoreSummary

ROOT = Path(__file__).parents[3]
ApiServer = Any  # conftest's; a test module cannot import it
Schema = dict[str, Any]


def moemodel(**spec: Any) -> dict[str, Any]:
    head = {"apiVersion": "faasmoe.dev/v1alpha1", "kind": "MoEModel"}
    metadata = {"name": "demo", "namespace": "llm"}
    return {**head, "metadata": metadata, "spec": {"model": {"source": "hf://org/name"}, **spec}}


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from nodes(schema[name], f"{path}.{name}")


def nodes_of(field: str) -> list[tuple[str, Schema]]:
    version = build_crd()["spec"]["versions"][0]
    return list(nodes(version["schema"]["openAPIV3Schema"]["properties"][field], f".{field}"))


NODES = [*nodes_of("spec"), *nodes_of("status")]


def without_empty_values(value: Any) -> Any:
    """Drop empty lists, mappings and None, which the API server does not add as defaults."""
    if isinstance(value, dict):
        entries = {key: without_empty_values(entry) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if entry not in ({}, [], None)}
    return [without_empty_values(entry) for entry in value] if isinstance(value, list) else value


def test_committed_crd_is_up_to_date() -> None:
    path = ROOT / "crds" / CRD_FILE_NAME
    assert path.read_text() == render_crd_yaml(), "`faasmoe crd --output crds` writes it"


def test_yaml_round_trips() -> None:
    assert yaml.safe_load(render_crd_yaml()) == build_crd()


def test_every_node_has_a_type() -> None:
    wrong = [p for p, node in NODES if "type" not in node and not _is_int_or_string(node)]
    assert wrong == []


def test_schema_is_structural() -> None:
    unknown = {"$ref", "const", "title", "oneOf", "patternProperties", "propertyNames"}
    wrong = [p for p, node in NODES if unknown & set(node)]
    assert wrong == []
    assert [p for p, node in NODES if "anyOf" in node and not _is_int_or_string(node)] == []
    assert [p for p, node in NODES if node.get("additionalProperties") in (True, False)] == []


def test_every_value_is_bounded() -> None:
    bounds = {
        "string": ("maxLength", "enum", "format"),
        "array": ("maxItems",),
        "integer": ("maximum",),
        "number": ("maximum",),
    }
    wrong = [
        path
        for path, node in NODES
        if not any(bound in node for bound in bounds.get(node.get("type", ""), node))
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert wrong == []


def test_bounds_are_exact_as_doubles() -> None:
    """An API server rejects every value of a field whose bound is near 2**63."""
    assert [path for path, node in NODES if abs(node.get("maximum", 0)) > 1 << 53] == []


def test_only_affinity_preserves_unknown_fields() -> None:
    preserving = {p for p, node in NODES if node.get("x-kubernetes-preserve-unknown-fields")}
    assert all(".template.affinity." in path for path in preserving)
    assert len(preserving) == 6


def test_every_section_of_the_spec_has_a_description() -> None:
    spec = dict(nodes_of("spec"))
    sections = ("router", "experts", "tenants", "networking", "store", "model")
    assert [name for name in sections if not spec[f".spec.{name}"].get("description")] == []


def test_fields_of_the_process_platform_are_left_out() -> None:
    paths = {path for path, _ in NODES}
    assert ".spec.store.size" in paths
    assert ".spec.store.path" not in paths
    assert ".spec.tenants.items.apiKeysPath" not in paths


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="empty"),
        pytest.param(
            {
                "tenants": [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}],
                "experts": {"scaling": {"overrides": [{"layers": "0"}]}, "template": {}},
                "router": {"template": {"tolerations": [{"key": "gpu"}]}},
                "monitoring": {"serviceMonitor": {}},
            },
            id="objects-in-lists",
        ),
    ],
)
def test_crd_defaults_equal_the_models_defaults(
    api_server: ApiServer, spec: dict[str, Any]
) -> None:
    obj = moemodel(**spec)
    stored = api_server.defaulted(obj)
    model = MoEModel.from_object(obj)
    assert without_empty_values(stored) == without_empty_values(model.to_object())
    assert MoEModel.from_object(stored) == model


def test_store_summary_is_a_valid_status(api_server: ApiServer) -> None:
    summary = StoreSummary(
        digest="sha256:0",
        revision="0" * 40,
        source="hf://org/name",
        family="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        dtype="bfloat16",
        hidden_size=2048,
        vocab_size=151_936,
        max_position_embeddings=8192,
        num_hidden_layers=24,
        size_bytes=1 << 35,
        router_bytes=1 << 31,
        layers=(LayerGroup(23, 64, 6, 1 << 34, 1 << 20),),
        quantization=QuantizationEntry("mxfp4", "int8"),
        router_quantized_bytes=1 << 30,
    )
    assert api_server.problems({**moemodel(), "status": {"model": summary.to_status()}}) == []


def test_paths_of_scale_and_printer_columns_exist() -> None:
    version = build_crd()["spec"]["versions"][0]
    paths = {path for path, _ in NODES}
    assert set(version["subresources"]["scale"].values()) <= paths
    plain = [
        c["jsonPath"] for c in version["additionalPrinterColumns"] if "[?" not in c["jsonPath"]
    ]
    assert {path for path in plain if not path.startswith(".metadata")} <= paths


def _is_int_or_string(node: Schema) -> bool:
    return bool(node.get("x-kubernetes-int-or-string"))


def test_every_field_has_a_description() -> None:
    def undescribed(schema: dict[str, Any], path: str) -> Iterator[str]:
        for name, field in schema.get("properties", {}).items():
            if not field.get("description") and f"{path}.{name}" != ".metadata":
                yield f"{path}.{name}"
            yield from undescribed(field, f"{path}.{name}")
        for values in (schema.get("items"), schema.get("additionalProperties")):
            if isinstance(values, dict):
                yield from undescribed(values, f"{path}[]")

    (version,) = build_crd()["spec"]["versions"]
    assert list(undescribed(version["schema"]["openAPIV3Schema"], "")) == []


def test_metadata_has_a_type_and_the_name_alone() -> None:
    """An API server rejects a CRD that specifies more, even a description."""
    (version,) = build_crd()["spec"]["versions"]
    metadata = version["schema"]["openAPIV3Schema"]["properties"]["metadata"]
    assert set(metadata) == {"type", "properties"}
    assert set(metadata["properties"]) <= {"name", "generateName"}


def test_wide_output_has_more_columns() -> None:
    (version,) = build_crd()["spec"]["versions"]
    wide = [c["name"] for c in version["additionalPrinterColumns"] if c.get("priority", 0) > 0]
    assert wide == ["Routers", "Sandboxes", "Dtype", "Message"]
