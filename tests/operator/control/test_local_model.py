import json
from pathlib import Path

import pytest

from faasmoe_contracts.store import LayerEntry, Manifest, ModelEntry, sha256_of_file
from faasmoe_contracts.store.manifest import FileEntry
from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.control.local_model import LocalModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def local_model(
    folder: Path, *, requested: str, stored: str, revision: str | None = None
) -> LocalModel:
    """Return a MoEModel with a requested source and a store prepared from the stored one."""
    store = folder / "store"
    store.mkdir()
    (store / "layer").write_bytes(b"x")
    manifest = Manifest.create(
        model=ModelEntry(stored, COMMIT, "tiny", "Tiny", "bfloat16", 4, 10, 64, 1),
        layers=(LayerEntry(0, "l0", "layer", 8, 2, 4, "Experts", None, 8, 0, ("0" * 32,) * 9),),
        files={"layer": FileEntry(1, sha256_of_file(store / "layer"))},
    )
    (store / "manifest.json").write_text(json.dumps(manifest.to_json()))
    model = {"source": requested} | ({"revision": revision} if revision else {})
    file = folder / "model.yaml"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "faasmoe.dev/v1alpha1",
                "kind": "MoEModel",
                "metadata": {"name": "tiny"},
                "spec": {"model": model, "store": {"path": "store"}},
            }
        )
    )
    return LocalModel.load(file)


@pytest.mark.parametrize(
    ("requested", "stored"),
    [
        ("hf://org/name", "org/name"),
        ("hf://org/name", "hf://org/name"),
        ("file:///models/one", "/models/one"),
        ("file:///models/one", "file:///models/one"),
    ],
)
def test_opens_a_store_of_the_same_source(tmp_path: Path, requested: str, stored: str) -> None:
    store = local_model(tmp_path, requested=requested, stored=stored).open_store()
    assert store.manifest.model.source == stored


@pytest.mark.parametrize("stored", ["org/other", "hf://org/other", "/models/one", "file:///m"])
def test_rejects_a_store_of_another_source(tmp_path: Path, stored: str) -> None:
    with pytest.raises(MoEModelError, match=r"spec\.model\.source: got hf://org/name, expected"):
        local_model(tmp_path, requested="hf://org/name", stored=stored).open_store()


def test_rejects_a_store_of_another_commit(tmp_path: Path) -> None:
    model = local_model(tmp_path, requested="hf://org/name", stored="org/name", revision="f" * 40)
    with pytest.raises(MoEModelError, match=rf"spec\.model\.revision: .*expected {COMMIT}"):
        model.open_store()


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_opens_a_store_of_the_same_commit_or_a_branch(tmp_path: Path, revision: str) -> None:
    model = local_model(tmp_path, requested="hf://org/name", stored="org/name", revision=revision)
    assert model.open_store().manifest.model.revision == COMMIT


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        pytest.param(
            {"model": {"source": "pvc://models/one"}},
            r"spec\.model\.source: got 'pvc://models/one', expected hf://ORG/NAME or file://PATH",
            id="claim",
        ),
        pytest.param(
            {
                "model": {"source": "hf://org/name"},
                "tenants": [{"name": "a", "apiKeysSecretRef": {"name": "a-keys"}}],
            },
            r"spec\.tenants\.0\.apiKeysPath: missing: .* create a folder with one file for each",
            id="keys-in-a-secret",
        ),
    ],
)
def test_rejects_models_that_need_kubernetes(
    tmp_path: Path, spec: dict[str, object], problem: str
) -> None:
    file = tmp_path / "model.yaml"
    head = {"apiVersion": "faasmoe.dev/v1alpha1", "kind": "MoEModel", "metadata": {"name": "tiny"}}
    file.write_text(json.dumps({**head, "spec": spec}))
    with pytest.raises(MoEModelError, match=problem):
        LocalModel.load(file)
