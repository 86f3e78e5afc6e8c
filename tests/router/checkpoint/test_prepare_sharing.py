"""Stores that share equal experts and router tensors: by hard links, compared byte by byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faasmoe_contracts.store import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    QuantizationEntry,
    Store,
    StoreError,
)
from faasmoe_contracts.store.digests import layer_digests
from faasmoe_contracts.store.referenced_files import FilePlace
from faasmoe_contracts.store.references import CheckpointEntry, StoreMode
from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.reference_digests import verify_references
from faasmoe_router.checkpoint.sharing import share
from faasmoe_router.checkpoint.sharing.equality import find_equal
from faasmoe_router.checkpoint.sharing.parts import Part

MakeCheckpoint = Callable[..., Path]
INT8 = QuantizationEntry("int8", "none")
CHANGED = (1, 4)  # experts of a variant's first layer, of 6
WEIGHTS = "model.safetensors"


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def change_experts(tensors: dict[str, torch.Tensor], experts: Sequence[int] = CHANGED) -> None:
    for name, tensor in tensors.items():
        if any(f"layers.0.mlp.experts.{expert}." in name for expert in experts):
            tensor += 1


@pytest.fixture
def variants(make_checkpoint: MakeCheckpoint) -> tuple[Path, Path]:
    """A checkpoint, and one with other experts in its first layer and another last norm."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        change_experts(tensors)
        tensors["model.norm.weight"] += 1

    base = make_checkpoint(name="base", dtype=torch.bfloat16)
    tuned = make_checkpoint(name="tuned", dtype=torch.bfloat16)
    change_weights(tuned, change)
    return base, tuned


def prepare_store(
    checkpoint: Path,
    store: Path,
    *,
    mode: StoreMode = StoreMode.AUTO,
    share_with: Sequence[Path] = (),
    quantization: QuantizationEntry = QuantizationEntry(),  # noqa: B008
) -> Store:
    return prepare(
        str(checkpoint), store, mode=mode, share_with=share_with, quantization=quantization
    )


def entry_of(store: Store) -> CheckpointEntry:
    assert store.manifest.checkpoint is not None
    return store.manifest.checkpoint


def is_shared(store: Store, layer: int, expert: int) -> bool:
    """Whether all bytes of an expert lie in shared files; raises if only some do."""
    mapped = store.map_layer(layer)
    pieces = [p for view in mapped.tensors.values() for p in view.expert_pieces(expert)]
    (shared,) = {mapped.files[piece.file].path.parent.name == "shared" for piece in pieces}
    return shared


def tensor_bytes(store: Store) -> dict[str, bytes]:
    """All tensors of a store by name."""
    found: dict[str, bytes] = {}
    for layer in store.manifest.layers:
        for name, view in store.map_layer(layer.index).tensors.items():
            found[f"{layer.name}.{name}"] = b"".join(piece.buffer for piece in view.pieces)
    for name, view in store.map_router_references().tensors.items():
        found[name] = bytes(view.buffer)
    for path in store.router_files():
        for name, tensor in load_file(path).items():
            found[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("mode", "quantization"),
    [
        (StoreMode.AUTO, QuantizationEntry()),
        (StoreMode.COPY, QuantizationEntry()),
        (StoreMode.AUTO, INT8),
        (StoreMode.COPY, QuantizationEntry("int4", "int8")),
    ],
    ids=str,
)
def test_equal_experts_and_router_tensors_are_shared(
    variants: tuple[Path, Path], tmp_path: Path, mode: StoreMode, quantization: QuantizationEntry
) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "a", mode=mode, quantization=quantization)
    alone = prepare_store(tuned, tmp_path / "alone", mode=mode, quantization=quantization)
    store = prepare_store(
        tuned, tmp_path / "b", mode=mode, quantization=quantization, share_with=[tmp_path / "a"]
    )
    for layer in store.manifest.layers:
        for expert in range(layer.num_experts):
            is_changed = layer.index == 0 and expert in CHANGED
            assert is_shared(store, layer.index, expert) == (not is_changed)
        mapped = store.map_layer(layer.index)
        assert layer_digests(mapped, layer.num_experts) == layer.digests
        assert layer.digests == alone.manifest.layers[layer.index].digests
    assert tensor_bytes(store) == tensor_bytes(alone)
    entry = entry_of(store)
    places = {name: entry.files[r.tensor.pieces[0][0]].place for name, r in entry.router.items()}
    assert places.pop("model.norm.weight", FilePlace.CHECKPOINT) is FilePlace.CHECKPOINT
    assert set(places.values()) == {FilePlace.SHARED}
    assert store.manifest.weight_bytes == pytest.approx(alone.manifest.weight_bytes, rel=0.5)
    store.verify()
    verify_references(store)


def test_a_copy_holds_only_what_differs(variants: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "a", mode=StoreMode.COPY)
    store = prepare_store(tuned, tmp_path / "b", mode=StoreMode.COPY, share_with=[tmp_path / "a"])
    assert [path.name for path in (store.path / "experts").iterdir()] == ["00000.safetensors"]
    own = load_file(store.path / "experts" / "00000.safetensors")
    assert {len(tensor) for tensor in own.values()} == {len(CHANGED)}
    (router,) = store.router_files()
    assert list(load_file(router)) == ["model.norm.weight"]
    twin = prepare_store(base, tmp_path / "c", mode=StoreMode.COPY, share_with=[tmp_path])
    assert not list((twin.path / "experts").iterdir())
    assert not twin.router_files()
    assert entry_of(twin).root == ""
    assert all(
        len(r.pieces) == 1 for layer in entry_of(twin).layers.values() for r in layer.values()
    )
    verify_references(twin)


def test_a_shared_file_outlives_the_store_that_it_comes_from(
    variants: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "a")
    expected = tensor_bytes(prepare_store(tuned, tmp_path / "alone"))
    b = prepare_store(tuned, tmp_path / "b", share_with=[tmp_path / "a"])
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(base)
    c = prepare_store(tuned, tmp_path / "c", share_with=[tmp_path / "b", tmp_path / "alone"])
    (link,) = (c.path / "shared").iterdir()
    assert link.samefile(next((b.path / "shared").iterdir()))
    for store in (b, c):
        verify_references(Store.open(store.path))
        assert tensor_bytes(store) == expected
    shutil.rmtree(c.path)
    moved = b.path.rename(tmp_path / "moved")  # a link is found by its store
    verify_references(Store.open(moved))


def test_a_shared_file_that_is_rewritten_or_missing_is_named(
    variants: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "a")
    store = prepare_store(tuned, tmp_path / "b", share_with=[tmp_path / "a"])
    (link,) = (store.path / "shared").iterdir()
    (piece,) = store.map_layer(1).tensors["down_proj"].expert_pieces(3)
    with (base / WEIGHTS).open("r+b") as file:  # in place, so that it stays linked
        file.seek(piece.offset)
        file.write(b"other")
    with pytest.raises(StoreError, match=r"b/shared/00000\.safetensors: .*expert 3.*got digest"):
        verify_references(store)
    link.unlink()
    origin = base / WEIGHTS
    with pytest.raises(StoreError, match=rf"a hard link of {origin}; prepare the store again"):
        Store.open(store.path)


def test_an_expert_of_the_same_digest_with_other_bytes_is_not_shared(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint(name="base", dtype=torch.bfloat16, moe_intermediate_size=128)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"  # of two whole pages
    twin = shutil.copytree(base, tmp_path / "twin")

    def swap_words(tensors: dict[str, torch.Tensor]) -> None:
        words = tensors[name].reshape(-1).view(torch.int64)
        words[:2] = words[:2].flip(0)  # the sum of the page stays

    change_weights(twin, swap_words)
    a = prepare_store(base, tmp_path / "a")
    store = prepare_store(twin, tmp_path / "b", share_with=[a.path])
    assert store.manifest.layers[0].digests == a.manifest.layers[0].digests
    assert [is_shared(store, 0, expert) for expert in range(6)] == [True, True, False, *[True] * 3]


def test_no_link_for_little_of_a_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = make_checkpoint(name="base")
    other = make_checkpoint(name="other")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name != "model.norm.weight":
                tensor += 1

    change_weights(other, change)
    prepare_store(base, tmp_path / "a")
    store = prepare_store(other, tmp_path / "b", share_with=[tmp_path / "a"])
    assert not (store.path / "shared").exists()
    assert {file.place for file in entry_of(store).files} == {FilePlace.CHECKPOINT}


def test_stores_of_one_checkpoint_share_its_files_without_links(
    variants: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = variants
    a = prepare_store(base, tmp_path / "a")
    b = prepare_store(base, tmp_path / "b", share_with=[tmp_path])
    assert not (b.path / "shared").exists()
    assert a.manifest.digest == b.manifest.digest


def test_what_cannot_be_linked_is_not_shared(
    variants: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    base, tuned = variants
    prepare_store(base, tmp_path / "a")
    expected = prepare_store(tuned, tmp_path / "alone")
    monkeypatch.setattr(os, "link", refuse)
    store = prepare_store(tuned, tmp_path / "b", share_with=[tmp_path / "a"])
    assert store.manifest == expected.manifest
    assert not (store.path / "shared").exists()
    assert "is not shared: no hard link of it: Invalid cross-device link" in caplog.text


def test_a_store_that_is_removed_meanwhile_is_not_shared(
    variants: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(*arguments: Any) -> dict[int, Part]:
        shutil.rmtree(tmp_path / "a")
        return find_equal(*arguments)

    prepare_store(variants[0], tmp_path / "a", mode=StoreMode.COPY)
    monkeypatch.setattr(share, "find_equal", remove_first)
    store = prepare_store(
        variants[1], tmp_path / "b", mode=StoreMode.COPY, share_with=[tmp_path / "a"]
    )
    assert store.manifest.checkpoint is None


def test_a_store_with_a_pipe_for_a_file_is_left_out(
    variants: tuple[Path, Path], tmp_path: Path
) -> None:
    stores = tmp_path / "stores"
    other = prepare_store(variants[0], stores / "base", mode=StoreMode.COPY)
    files = dict(other.manifest.files)
    name = next(name for name in files if name.startswith("router/"))
    files[name] = FileEntry(0, files[name].sha256)
    manifest = other.manifest
    hostile = Manifest.create(model=manifest.model, layers=manifest.layers, files=files)
    (other.path / MANIFEST_NAME).write_text(json.dumps(hostile.to_json()))
    (other.path / name).unlink()
    os.mkfifo(other.path / name)
    store = prepare_store(variants[1], tmp_path / "b", mode=StoreMode.COPY, share_with=[stores])
    assert store.manifest.checkpoint is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("mode", [StoreMode.AUTO, StoreMode.COPY])
def test_other_families_share(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, mode: StoreMode
) -> None:
    base = make_checkpoint(family, name="base", dtype=torch.bfloat16)
    tuned = make_checkpoint(family, name="tuned", dtype=torch.bfloat16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        experts = sorted(name for name in tensors if "experts" in name and "shared" not in name)
        tensors[experts[0]].reshape(-1)[:1] += 1

    change_weights(tuned, change)
    prepare_store(base, tmp_path / "a", mode=mode)
    alone = prepare_store(tuned, tmp_path / "alone", mode=mode)
    store = prepare_store(tuned, tmp_path / "b", mode=mode, share_with=[tmp_path / "a"])
    assert tensor_bytes(store) == tensor_bytes(alone)
    n_own = sum(
        not is_shared(store, layer.index, expert)
        for layer in store.manifest.layers
        for expert in range(layer.num_experts)
    )
    assert n_own == 1
    verify_references(store)


def test_a_layer_that_reads_stacks_is_shared_as_a_whole_or_not_at_all(
    variants: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faasmoe_router.checkpoint.manifest.select_kernel", lambda _: None)
    base, tuned = variants
    prepare_store(base, tmp_path / "a", mode=StoreMode.COPY)
    store = prepare_store(tuned, tmp_path / "b", mode=StoreMode.COPY, share_with=[tmp_path / "a"])
    assert [bool(layer.file) for layer in store.manifest.layers] == [True, False]
    assert all(len(r.pieces) == 1 for r in entry_of(store).layers[1].values())
    store.verify()
    verify_references(store)


def test_command_says_what_is_shared_and_refuses_what_is_no_store(
    variants: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "stores" / "a")
    (tmp_path / "stores" / "damaged").mkdir()
    (tmp_path / "stores" / "damaged" / "manifest.json").write_text("{}")
    command = ["prepare", str(tuned), str(tmp_path / "stores" / "b")]
    assert main([*command, f"--share-with={tmp_path / 'absent'}"]) != 0
    assert "share-with: got" in capsys.readouterr().err
    assert main([*command, f"--share-with={tmp_path / 'stores'}"]) == 0
    output = capsys.readouterr().out
    assert f"shared with other stores, by hard links of {base / WEIGHTS}" in output
    assert main([*command, f"--share-with={tmp_path / 'stores'}"]) == 0  # verifies it


def test_force_and_an_interruption_leave_no_stale_links(
    variants: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = variants
    prepare_store(base, tmp_path / "a", mode=StoreMode.COPY)
    path, share_with = tmp_path / "b", [tmp_path / "a"]
    commit = "faasmoe_router.checkpoint.store_writer.StoreFolder.commit"
    with monkeypatch.context() as patch:
        patch.setattr(commit, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_store(tuned, path, mode=StoreMode.COPY, share_with=share_with)
    assert list((path / "shared").iterdir())
    alone = prepare_store(tuned, tmp_path / "alone", mode=StoreMode.COPY)
    resumed = prepare_store(tuned, path, mode=StoreMode.COPY)
    assert resumed.manifest == alone.manifest
    assert not (path / "shared").exists()
    forced = prepare(str(tuned), path, mode=StoreMode.COPY, share_with=share_with, force=True)
    assert (path / "shared").exists()
    forced.verify()
    verify_references(forced)
