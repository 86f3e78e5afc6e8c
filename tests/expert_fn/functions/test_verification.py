"""Bytes that do not match their digests are detected, named and never computed with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.digests import page_sum_digest
from faasmoe_contracts.wire import Dtype, ExpertRequest, FrameHeader, FrameKind, OutputMode
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_expert.functions import ExpertFunction, verification
from faasmoe_expert.functions.verification import BlockVerifier, OutOfTime, VerifiedBlocks

FAMILY = "mixtral"


@pytest.fixture(params=["copy", "reference"])
def store(request: pytest.FixtureRequest, prepared_store: PreparedStore, tmp_path: Path) -> Store:
    """A copy of a store, and of the checkpoint that it may refer to, that tests may damage."""
    prepared = prepared_store(FAMILY, mode=request.param)
    shutil.copytree(prepared.path.parent, tmp_path / "model")
    return Store.open(tmp_path / "model" / prepared.path.name)


@pytest.fixture(autouse=True)
def fresh_verified_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    verified_blocks = VerifiedBlocks(None)
    monkeypatch.setattr(verification, "process_verified_blocks", lambda: verified_blocks)


def file_of(store: Store, layer: int) -> Path:
    (file,) = store.map_layer(layer).files
    return file.path


def flip_bit(store: Store, layer: int, expert: int, *, bit: int = 3) -> Callable[[], None]:
    """Flip a bit of an expert in the first stacked tensor; return a function that undoes it."""
    path, entry = file_of(store, layer), store.layer_entry(layer)
    mapped = store.map_layer(layer)
    first = next(v for v in mapped.tensors.values() if v.is_stacked(entry.num_experts))
    offset = first.expert_pieces(expert)[0].offset

    def toggle() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)

    toggle()
    return toggle


def request_for(expert: int) -> ExpertRequest:
    rows = np.ones((1, 32), dtype=np.float32)
    header = FrameHeader(FrameKind.REQUEST, Dtype.FLOAT32, OutputMode.REDUCED, 0, 1, 1, 32)
    return ExpertRequest(
        header,
        np.zeros(1, np.int32),
        np.full(1, expert, np.int32),
        np.ones(1, np.float32),
        memoryview(bytearray(rows.tobytes())),
    )


def function(store: Store, experts: range) -> ExpertFunction:
    return ExpertFunction(make_function_spec(store, [0], experts), store)


def test_verifies_every_expert_of_every_layer(store: Store) -> None:
    for layer in store.manifest.layers:
        assert len(set(layer.digests[:-1])) == layer.num_experts
        experts = range(layer.num_experts)
        assert BlockVerifier(
            store, layer, store.map_layer(layer.index), experts
        ).verify_if_changed()


def test_rejects_a_damaged_expert_and_serves_the_others(store: Store) -> None:
    flip_bit(store, 0, expert=5)
    with pytest.raises(
        BlockCorrupted, match=r"store: layer 0, expert 5 of .*: got digest .*, expected"
    ):
        function(store, range(4, 8))
    function(store, range(4)).compute(request_for(1))


def test_detects_damage_before_returning_an_output(store: Store) -> None:
    attached = function(store, range(4))
    expected = attached.compute(request_for(2))
    restore = flip_bit(store, 0, expert=2)
    for _ in range(2):
        with pytest.raises(BlockCorrupted, match="expert 2"):
            attached.compute(request_for(2))
    restore()
    assert torch.equal(attached.compute(request_for(2)), expected)
    flip_bit(store, 0, expert=7)  # outside the block
    assert torch.equal(attached.compute(request_for(2)), expected)


def test_replaced_or_removed_file_does_not_affect_the_mapping(store: Store) -> None:
    attached = function(store, range(4))
    expected = attached.compute(request_for(2))
    path = file_of(store, 0)
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)
    assert torch.equal(attached.compute(request_for(2)), expected)
    path.unlink()
    assert torch.equal(attached.compute(request_for(2)), expected)


def test_verified_blocks_are_skipped_by_all_processes_until_the_file_changes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, digested = store.layer_entry(0), []

    def recording_digest(parts: object) -> str:
        digested.append(parts)
        return page_sum_digest(parts)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "page_sum_digest", recording_digest)

    def check(verified_blocks: VerifiedBlocks) -> int:
        digested.clear()
        BlockVerifier(
            store, layer, store.map_layer(0), range(3), verified_blocks=verified_blocks
        ).verify_if_changed()
        return len(digested)

    verified_blocks = VerifiedBlocks(tmp_path / "verified")
    assert [check(verified_blocks), check(verified_blocks)] == [4, 0]
    assert check(VerifiedBlocks(tmp_path / "verified")) == 0  # as in another process
    assert check(VerifiedBlocks(None)) == 4
    os.utime(file_of(store, 0))
    assert check(verified_blocks) == 4


def test_verification_ends_between_two_experts_and_goes_on_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified, clock_s = VerifiedBlocks(None), iter(range(100))
    monkeypatch.setattr(verification, "MAX_THREADS", 1)
    clock = SimpleNamespace(monotonic=lambda: next(clock_s))
    monkeypatch.setattr("faasmoe_expert.functions.verification.time", clock)
    layer = store.layer_entry(0)

    def verifier() -> BlockVerifier:
        mapped = store.map_layer(0)
        return BlockVerifier(store, layer, mapped, range(4), verified_blocks=verified)

    unfinished = verifier()
    with pytest.raises(OutOfTime):
        unfinished.verify_if_changed(until_s=1.0)  # two experts, each of a second
    with pytest.raises(BlockCorrupted, match="not finished"):
        unfinished.verify_if_changed()
    assert not unfinished.files
    assert verifier().verify_if_changed()
    assert next(clock_s) == 3 + 3  # the third was asked about twice, the first two once


def test_unwritable_marker_directory_only_disables_sharing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    layer = store.layer_entry(0)
    for _ in range(2):
        verified_blocks = VerifiedBlocks(tmp_path / "file" / "verified")
        assert BlockVerifier(
            store, layer, store.map_layer(0), range(3), verified_blocks=verified_blocks
        ).verify_if_changed()
