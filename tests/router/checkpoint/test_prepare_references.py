"""Stores by reference: what they refer to, what they copy and why, and checkpoints that change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faasmoe_contracts.store import MANIFEST_NAME, QuantizationEntry, Store, StoreError
from faasmoe_contracts.store.digests import layer_digests
from faasmoe_contracts.store.references import CheckpointEntry, StoreMode
from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.reference_digests import verify_references
from faasmoe_router.errors import SourceUnsupported, StoreMismatch, WeightsNotFinite

MakeCheckpoint = Callable[..., Path]


def by_reference(checkpoint: Path, store: Path, **arguments: object) -> Store:
    return prepare(str(checkpoint), store, mode=StoreMode.AUTO, **arguments)  # type: ignore[arg-type]


def entry_of(store: Store) -> CheckpointEntry:
    assert store.manifest.checkpoint is not None
    return store.manifest.checkpoint


def pieces(store: Store, name: str) -> int:
    return len(entry_of(store).layers[0][name].pieces)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_digests_are_those_of_the_mapped_bytes(
    make_checkpoint: MakeCheckpoint,
    stored_tensors: Callable[[Store], dict[str, torch.Tensor]],
    tmp_path: Path,
    family: str,
) -> None:
    checkpoint = make_checkpoint(family, dtype=torch.bfloat16)
    store = by_reference(checkpoint, tmp_path / "store")
    for layer in store.manifest.layers:
        assert not layer.file
        mapped = store.map_layer(layer.index)
        assert layer_digests(mapped, layer.num_experts) == layer.digests
    expected = stored_tensors(prepare(str(checkpoint), tmp_path / "copy"))
    mapped = store.map_router_references()
    for name, view in mapped.tensors.items():
        tensor = torch.frombuffer(view.buffer, dtype=torch.uint8)
        assert torch.equal(tensor, expected[name].reshape(-1).view(torch.uint8))
    verify_references(store)


def test_experts_are_one_piece_two_or_a_stack_as_they_lie(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def store(family: str) -> Store:
        return by_reference(make_checkpoint(family, name=family), tmp_path / f"{family}.store")

    assert pieces(store("qwen2_moe"), "gate_up_proj") == 6  # gate and up follow each other
    assert pieces(store("mixtral"), "gate_up_proj") == 2 * 4  # w1, w2, w3: down lies between
    assert pieces(store("gpt_oss"), "gate_up_proj") == 1


def test_experts_may_lie_in_several_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mixtral", max_shard_size="20KB")
    store = by_reference(checkpoint, tmp_path / "store")
    assert len(store.map_layer(0).files) > 1
    copy = prepare(str(checkpoint), tmp_path / "copy")
    for name, view in copy.map_layer(0).tensors.items():
        for expert in range(4):
            got = store.map_layer(0).tensors[name].expert_pieces(expert)
            (whole,) = view.expert_pieces(expert)
            assert b"".join(piece.buffer for piece in got) == bytes(whole.buffer)


def test_what_is_converted_is_copied_and_says_why(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint()
    store = by_reference(checkpoint, tmp_path / "bf16", dtype="bfloat16")
    assert not entry_of(store).layers
    assert all(layer.file for layer in store.manifest.layers)
    (reason,) = {r for r in entry_of(store).copied if "experts" not in r and "gate_up" in r}
    assert reason == "gate_up_proj: converted from F32 to bfloat16"
    store = by_reference(
        checkpoint, tmp_path / "int8", quantization=QuantizationEntry("int8", "none")
    )
    assert not entry_of(store).layers
    assert entry_of(store).router  # a layer's weights and the router's are decided apart
    assert main(["prepare", str(checkpoint), str(tmp_path / "int8"), "--quantize=int8"]) == 0
    output = capsys.readouterr().out
    assert (
        "weights: copied: model.layers.0.mlp.experts and 1 more: gate_up_proj: quantised" in output
    )
    assert "by reference to ../checkpoint, which must stay: 0 of 2 MoE layers" in output


def test_a_checkpoint_of_which_nothing_is_referred_to_may_be_removed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(max_shard_size="20KB")
    store = by_reference(checkpoint, tmp_path / "bf16", dtype="bfloat16")
    assert not entry_of(store).files
    int8 = by_reference(checkpoint, tmp_path / "s", quantization=QuantizationEntry("int8", "int8"))
    assert 0 < len(entry_of(int8).files) < len(list(checkpoint.glob("*.safetensors")))
    shutil.rmtree(checkpoint)
    verify_references(Store.open(store.path))
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open(int8.path)


def test_one_layer_is_copied_where_only_its_tensors_are_converted(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    path = checkpoint / "model.safetensors"
    tensors = {
        name: tensor.half() if "layers.1.mlp.experts.3" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    store = by_reference(checkpoint, tmp_path / "store")
    assert set(entry_of(store).layers) == {0}
    assert [bool(layer.file) for layer in store.manifest.layers] == [False, True]
    with pytest.raises(SourceUnsupported, match=r"model\.layers\.1\.mlp\.experts must be copied"):
        prepare(str(checkpoint), tmp_path / "strict", mode=StoreMode.REFERENCE)


def test_mode_of_a_complete_store_is_kept_unless_forced(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    reference = by_reference(checkpoint, path)
    assert by_reference(checkpoint, path).manifest.digest == reference.manifest.digest
    with pytest.raises(StoreMismatch, match="in mode reference, expected mode copy; --force"):
        prepare(str(checkpoint), path, mode=StoreMode.COPY)
    prepare(str(checkpoint), path, mode=StoreMode.COPY, force=True).verify()
    assert by_reference(checkpoint, path).manifest.checkpoint is None
    with pytest.raises(StoreMismatch, match="in mode copy, expected mode reference"):
        prepare(str(checkpoint), path, mode=StoreMode.REFERENCE)


def test_two_stores_share_a_checkpoint_and_move_with_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    shutil.move(make_checkpoint(), folder / "checkpoint")
    stores = [by_reference(folder / "checkpoint", folder / name) for name in "ab"]
    assert stores[0].manifest.digest == stores[1].manifest.digest
    folder.rename(tmp_path / "moved")
    for name in "ab":
        verify_references(Store.open(tmp_path / "moved" / name))
    (tmp_path / "moved" / "checkpoint").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"checkpoint/model\.safetensors: cannot be read: No such"):
        Store.open(tmp_path / "moved" / "a")


def test_symbolic_links_of_a_hub_cache_are_resolved(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "blobs").mkdir()
    (checkpoint / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    (checkpoint / "model.safetensors").symlink_to("../blobs/0123")
    store = by_reference(checkpoint, tmp_path / "store")
    assert (entry_of(store).root, entry_of(store).files[0].name) == ("../blobs", "0123")
    store = by_reference(checkpoint, tmp_path / "deep" / "er" / "store")
    assert entry_of(store).root == str(tmp_path / "blobs")
    verify_references(store)


class Interrupted(Exception):
    """Ends a preparation."""


class InterruptAfter:
    def __init__(self, size_bytes: int) -> None:
        self.remaining_bytes = size_bytes

    def start(self, label: str, *, total_bytes: int) -> None:
        self.total_bytes = total_bytes

    def advance(self, size_bytes: int) -> None:
        self.remaining_bytes -= size_bytes
        if self.remaining_bytes < 0:
            raise Interrupted


@pytest.mark.parametrize("size_bytes", [0, 20_000, 60_000])
def test_interrupted_preparation_resumes_in_either_mode(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, size_bytes: int
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    for mode in (StoreMode.COPY, StoreMode.AUTO):
        with pytest.raises(Interrupted):
            prepare(str(checkpoint), path, mode=mode, progress=InterruptAfter(size_bytes))
        with pytest.raises(StoreError, match="not found"):
            Store.open(path)
    expected = by_reference(checkpoint, tmp_path / "expected")
    assert by_reference(checkpoint, path).manifest.digest == expected.manifest.digest


def test_every_referenced_byte_is_reported_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    progress = InterruptAfter(1 << 40)
    store = by_reference(make_checkpoint("mixtral"), tmp_path / "store", progress=progress)
    assert (1 << 40) - progress.remaining_bytes == progress.total_bytes
    assert progress.total_bytes == entry_of(store).size_bytes


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def test_changed_bytes_name_the_file_and_the_tensor(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    store = by_reference(checkpoint, tmp_path / "store")
    path = checkpoint / "model.safetensors"
    (piece,) = store.map_layer(1).tensors["down_proj"].expert_pieces(2)
    flip(path, piece.offset)
    os.utime(path, ns=(0, 0))
    with pytest.raises(
        StoreError,
        match=r"model\.safetensors: model\.layers\.1\.mlp\.experts: expert 2 "
        r"\(down_proj, gate_up_proj\): got digest \w+, expected \w+: the checkpoint changed",
    ):
        verify_references(Store.open(store.path))
    flip(path, piece.offset)
    norm = store.map_router_references().tensors["model.norm.weight"]
    flip(path, norm.offset)
    with pytest.raises(StoreError, match=r"model\.safetensors: model\.norm\.weight: got digest"):
        verify_references(store)
    flip(path, norm.offset)
    verify_references(store)  # other times and the same bytes


def test_a_file_that_is_not_as_it_was_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    store = by_reference(checkpoint, tmp_path / "store")
    path = checkpoint / "model.safetensors"
    size = path.stat().st_size

    def refused(match: str) -> None:
        for action in (
            lambda: Store.open(store.path),
            lambda: store.map_layer(0),
            store.map_router_references,
            lambda: verify_references(store),
        ):
            with pytest.raises(StoreError, match=rf"model\.safetensors: {match}"):
                action()

    content = path.read_bytes()
    os.truncate(path, size // 2)
    refused(rf"size: got {size // 2} bytes, expected {size}: the checkpoint changed")
    path.unlink()
    refused("cannot be read: No such file or directory")
    os.mkfifo(path)
    refused("got no regular file")
    path.unlink()
    (tmp_path / "other").write_bytes(content)
    path.symlink_to(tmp_path / "other")
    refused("got a path through a symbolic link")
    path.unlink()
    path.mkdir()
    refused("got no regular file")


def test_store_by_reference_needs_downloads_that_stay(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, downloads = make_checkpoint(), tmp_path / "hub"
    arguments = [
        "prepare",
        str(checkpoint),
        str(tmp_path / "store"),
        f"--discard-download={downloads}",
    ]
    assert main([*arguments, "--mode=reference"]) != 0
    assert "mode: got reference together with --discard-download" in capsys.readouterr().err
    assert main(arguments) == 0
    assert Store.open(tmp_path / "store").manifest.checkpoint is None


def test_manifest_of_a_copy_is_as_before(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    store = prepare(str(make_checkpoint()), tmp_path / "store")
    value = json.loads((store.path / MANIFEST_NAME).read_text())
    assert "checkpoint" not in value
    assert all(layer["file"] for layer in value["layers"])


def test_weights_that_are_not_finite_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        WeightsNotFinite, match=r"model\.safetensors: model\.layers\.1\.mlp\.experts: expert 3 "
    ):
        by_reference(checkpoint, tmp_path / "store")
    verify_references(by_reference(checkpoint, tmp_path / "store", allows_nonfinite=True))
