import json
from pathlib import Path

import pytest

from faasmoe_expert.store import LayerEntry, Manifest, ModelEntry, sha256_of_file
from faasmoe_expert.store.manifest import FileEntry
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.spec import MoEModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def deployment(folder: Path, *, wanted: str, held: str, revision: str | None = None) -> Deployment:
    """A MoEModel that wants one source over a store that was prepared from another."""
    store = folder / "store"
    store.mkdir()
    (store / "layer").write_bytes(b"x")
    manifest = Manifest.describing(
        model=ModelEntry(held, COMMIT, "tiny", "Tiny", "bfloat16", 4, 10, 64, 1),
        layers=(LayerEntry(0, "l0", "layer", 8, 2, 4, "Experts", None, 8, 0, ("0" * 32,) * 9),),
        files={"layer": FileEntry(1, sha256_of_file(store / "layer"))},
    )
    (store / "manifest.json").write_text(json.dumps(manifest.to_json()))
    model = {"source": wanted} | ({"revision": revision} if revision else {})
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
    return Deployment.load(file)


@pytest.mark.parametrize(
    ("wanted", "held"),
    [
        ("hf://org/name", "org/name"),
        ("hf://org/name", "hf://org/name"),
        ("file:///models/one", "/models/one"),
        ("file:///models/one", "file:///models/one"),
    ],
)
def test_a_store_of_the_same_source_is_opened(tmp_path: Path, wanted: str, held: str) -> None:
    store = deployment(tmp_path, wanted=wanted, held=held).open_store()
    assert store.manifest.model.source == held


@pytest.mark.parametrize("held", ["org/other", "hf://org/other", "/models/one", "file:///m"])
def test_a_store_of_another_source_is_refused(tmp_path: Path, held: str) -> None:
    with pytest.raises(MoEModelError, match=r"spec\.model\.source: got hf://org/name, expected"):
        deployment(tmp_path, wanted="hf://org/name", held=held).open_store()


def test_a_store_of_another_commit_is_refused(tmp_path: Path) -> None:
    wanted = deployment(tmp_path, wanted="hf://org/name", held="org/name", revision="f" * 40)
    with pytest.raises(MoEModelError, match=rf"spec\.model\.revision: .*expected {COMMIT}"):
        wanted.open_store()


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_the_same_commit_or_a_name_that_may_have_moved_is_opened(
    tmp_path: Path, revision: str
) -> None:
    model = deployment(tmp_path, wanted="hf://org/name", held="org/name", revision=revision)
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
            r"spec\.tenants\.0\.apiKeysPath: missing: .* make a folder with one file for each",
            id="keys-in-a-secret",
        ),
    ],
)
def test_what_only_kubernetes_can_serve_is_refused(
    tmp_path: Path, spec: dict[str, object], problem: str
) -> None:
    file = tmp_path / "model.yaml"
    head = {"apiVersion": "faasmoe.dev/v1alpha1", "kind": "MoEModel", "metadata": {"name": "tiny"}}
    file.write_text(json.dumps({**head, "spec": spec}))
    with pytest.raises(MoEModelError, match=problem):
        Deployment.load(file)
