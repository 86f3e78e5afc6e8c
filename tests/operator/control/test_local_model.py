import json
from pathlib import Path

import pytest

from faasmoe_contracts.store import LayerEntry, Manifest, ModelEntry, sha256_of_file
from faasmoe_contracts.store.manifest import FileEntry
from faasmoe_contracts.store.published import PublishedEntry
from faasmoe_contracts.store.referenced_files import CheckpointFile
from faasmoe_contracts.store.references import (
    CheckpointEntry,
    RouterReference,
    TensorReference,
)
from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli.plan import format_plan
from faasmoe_operator.control.local_model import LocalModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def local_model(
    folder: Path,
    *,
    requested: str,
    stored: str,
    revision: str | None = None,
    mode: str = "auto",
    checkpoint: CheckpointEntry | None = None,
    published: tuple[PublishedEntry, ...] = (),
) -> LocalModel:
    """Return a MoEModel with a requested source and a store prepared from the stored one."""
    store = folder / "store"
    store.mkdir()
    (store / "layer").write_bytes(b"x")
    manifest = Manifest.create(
        model=ModelEntry(stored, COMMIT, "tiny", "Tiny", "bfloat16", 4, 10, 64, 1),
        layers=(LayerEntry(0, "l0", "layer", 8, 2, 4, "Experts", None, 8, 0, ("0" * 32,) * 9),),
        files={"layer": FileEntry(1, sha256_of_file(store / "layer"))},
        checkpoint=checkpoint,
        published=published,
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
                "spec": {"model": model, "store": {"path": "store", "mode": mode}},
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


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_store_of_the_other_mode_is_refused_and_plan_says_what_lies_where(
    tmp_path: Path, is_reference: bool
) -> None:
    checkpoint = None
    if is_reference:
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "weights").write_bytes(bytes(9))
        norm = RouterReference(TensorReference("F32", (2,), ((0, 1),)), "0" * 32)
        checkpoint = CheckpointEntry(
            "../checkpoint",
            (CheckpointFile("weights", 9),),
            {},
            {"n": norm},
            {"quantised": ("l0",)},
        )
    got, other = ("reference", "copy") if is_reference else ("copy", "reference")
    for mode in ("auto", got, other):
        folder = tmp_path / mode
        folder.mkdir()
        (folder / "checkpoint").symlink_to(tmp_path / "checkpoint")
        model = local_model(
            folder, requested="hf://a/b", stored="a/b", mode=mode, checkpoint=checkpoint
        )
        if mode == other:
            with pytest.raises(MoEModelError, match=rf"mode: got {other}, expected auto or {got}"):
                model.open_store()
            continue
        manifest = model.open_store().manifest
        text = format_plan(model, manifest, model.functions(manifest, key=b"k" * 16))
        assert ("by reference to ../checkpoint, which must stay" in text) == is_reference
        assert ("copied: l0: quantised" in text) == is_reference
        assert ("copied into the store" in text) != is_reference


def test_plan_says_what_dequantising_costs_and_which_layers(tmp_path: Path) -> None:
    weights = ("model.layers.0-3.mlp.experts.down_proj",)
    sizes = (4, 10**9, 2 * 10**9)
    entry = PublishedEntry("experts", "fp8 128 x 128", "dequantised to bfloat16", weights, *sizes)
    model = local_model(tmp_path, requested="hf://a/b", stored="a/b", published=(entry,))
    manifest = model.open_store().manifest
    assert manifest.published == (entry,)
    text = format_plan(model, manifest, model.functions(manifest, key=b"k" * 16))
    assert "experts: 4 weights in fp8 128 x 128 are dequantised to bfloat16: 2 GB, 2.00" in text
    assert f"times the 1 GB of the checkpoint ({weights[0]})" in text


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
