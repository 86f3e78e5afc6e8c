import contextlib
import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faasmoe_contracts.store import Manifest, StoreError, manifest_digest

Change = Callable[[dict[str, Any]], object]


def test_round_trips_through_json(manifest: dict[str, Any]) -> None:
    parsed = Manifest.from_json(manifest)
    assert json.loads(json.dumps(parsed.to_json())) == manifest
    assert Manifest.from_json(parsed.to_json()) == parsed


def test_mirrors_the_json_fields(manifest: dict[str, Any]) -> None:
    parsed = Manifest.from_json(manifest)
    assert parsed.model.architecture == "MixtralForCausalLM"
    assert [layer.index for layer in parsed.layers] == [0, 1]
    assert parsed.layers[1].class_name == "MixtralExperts"
    assert parsed.layers[1].file == "experts/00001.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m.update(format="zip"), "manifest.format: got 'zip'", id="format"),
        pytest.param(lambda m: m.update(version=1), "version: got 1, expected 2", id="version"),
        pytest.param(lambda m: m.update(version=True), "version: got True", id="version-bool"),
        pytest.param(lambda m: m.update(version=1.0), "version: got 1.0", id="version-float"),
        pytest.param(lambda m: m.pop("digest"), "digest: got nothing", id="no-digest"),
        pytest.param(lambda m: m.update(digest="sha256:0"), "manifest.digest: got", id="digest"),
        pytest.param(lambda m: m.update(extra=1), "unknown fields extra", id="unknown"),
        pytest.param(lambda m: m.update(layers=[]), "manifest.layers: got none", id="no-layers"),
        pytest.param(lambda m: m.update(layers={}), "expected an array", id="layers-object"),
        pytest.param(lambda m: m.update(files=[]), "expected an object", id="files-array"),
        pytest.param(
            lambda m: m["model"].update(dtype="int8"), "model.dtype: got 'int8'", id="dtype"
        ),
        pytest.param(
            lambda m: m["model"].update(hidden_size=0), "model.hidden_size: got 0", id="hidden"
        ),
        pytest.param(lambda m: m["model"].update(revision=3), "model.revision: got 3", id="rev"),
        pytest.param(
            lambda m: m["layers"][1].update(index=7), r"layers\[1\].index: got 7", id="index"
        ),
        pytest.param(
            lambda m: m["layers"][0].update(num_experts=True), "num_experts: got True", id="bool"
        ),
        pytest.param(lambda m: m["layers"][0].update(top_k=4), "top_k: got 4", id="top-k"),
        pytest.param(lambda m: m["layers"][0].update(kernel="gated"), "kernel: got", id="kernel"),
        pytest.param(
            lambda m: m["layers"][0].update(file="experts/9"), "expected a name in files", id="file"
        ),
        pytest.param(
            lambda m: m["files"].update({"../x": {}}), "'../x', expected a path inside", id="escape"
        ),
        pytest.param(
            lambda m: m["files"].update({"x\0": {}}), "expected a path inside", id="zero-byte"
        ),
        pytest.param(
            lambda m: m["files"].update({"\ud800": {}}), "expected a path inside", id="surrogate"
        ),
        pytest.param(
            lambda m: m["files"]["model/config.json"].update(sha256="x"),
            "sha256: got 'x'",
            id="sha256",
        ),
    ],
)
def test_names_the_wrong_field(manifest: dict[str, Any], change: Change, message: str) -> None:
    change(manifest)
    with pytest.raises(StoreError, match=message):
        Manifest.from_json(manifest)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m["model"].update(source="org/other"), id="source"),
        pytest.param(lambda m: m["model"].update(revision="main"), id="revision"),
        pytest.param(lambda m: m["layers"][1].update(top_k=1), id="top-k"),
        pytest.param(lambda m: m["layers"][0].update(name="model.layers.9"), id="name"),
        pytest.param(lambda m: m["layers"][0].update(kernel=None), id="kernel"),
        pytest.param(lambda m: m["layers"][0]["kernel"].update(activation="gelu"), id="activation"),
        pytest.param(lambda m: m["files"]["model/config.json"].update(size_bytes=3), id="size"),
        pytest.param(lambda m: m["files"]["model/config.json"].update(sha256="0" * 64), id="sha"),
    ],
)
def test_digest_covers_all_fields(manifest: dict[str, Any], change: Change) -> None:
    change(manifest)
    with pytest.raises(StoreError, match=r"manifest\.digest: got .* prepare the store again"):
        Manifest.from_json(manifest)
    manifest["digest"] = manifest_digest(manifest)
    assert Manifest.from_json(manifest).to_json() == manifest


def test_digest_is_independent_of_field_order(manifest: dict[str, Any]) -> None:
    reordered = json.loads(json.dumps(manifest), object_pairs_hook=lambda pairs: dict(pairs[::-1]))
    assert list(reordered) == list(manifest)[::-1]
    assert manifest_digest(reordered) == manifest["digest"]


def test_create_computes_the_digest(manifest: dict[str, Any]) -> None:
    parsed = Manifest.from_json(manifest)
    assert Manifest.create(model=parsed.model, layers=parsed.layers, files=parsed.files) == parsed


def test_rejects_the_digest_of_an_earlier_version_with_a_remedy(manifest: dict[str, Any]) -> None:
    lines = "".join(f"{e['sha256']}  {name}\n" for name, e in sorted(manifest["files"].items()))
    manifest["digest"] = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    with pytest.raises(StoreError, match="earlier version; prepare the store again with --force"):
        Manifest.from_json(manifest)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), value=_JSON)
def test_any_value_in_any_field_parses_or_raises_store_error(
    manifest: dict[str, Any], data: st.DataObject, value: Any
) -> None:
    container: Any = copy.deepcopy(manifest)
    changed = container
    while isinstance(container, dict | list) and container:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()) or not isinstance(container[key], dict | list):
            container[key] = value
            break
        container = container[key]
    with contextlib.suppress(StoreError):
        Manifest.from_json(changed)
