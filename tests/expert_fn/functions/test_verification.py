"""Bytes that are not those that were prepared are found, named, and not computed with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Dtype, ExpertRequest, FrameHeader, FrameKind, OutputMode
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_expert.functions import ExpertFunction, verification
from faasmoe_expert.functions.verification import BlockVerifier, VerifiedBlocks, page_sum_digest

FAMILY = "mixtral"


@pytest.fixture
def store(prepared_store: PreparedStore, tmp_path: Path) -> Store:
    """A copy that a test may damage."""
    shutil.copytree(prepared_store(FAMILY).path, tmp_path / "store")
    return Store.open(tmp_path / "store")


@pytest.fixture(autouse=True)
def fresh_verified_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    verified_blocks = VerifiedBlocks(None)
    monkeypatch.setattr(verification, "shared_memory", lambda: verified_blocks)


def file_of(store: Store, layer: int) -> Path:
    return store.path / store.layer_entry(layer).file


def flip(store: Store, layer: int, expert: int, *, bit: int = 3) -> Callable[[], None]:
    """Flip a bit of the first tensor's expert; return what flips it back."""
    path, entry = file_of(store, layer), store.layer_entry(layer)
    mapped = store.map_layer(layer)
    begin = path.stat().st_size - mapped.size_bytes
    first = next(v for v in mapped.tensors.values() if v.shape[:1] == (entry.num_experts,))
    offset = begin + expert * (first.buffer.nbytes // entry.num_experts)

    def flip_bit() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)

    flip_bit()
    return flip_bit


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


@given(st.binary(min_size=1, max_size=20_000), st.data())
def test_a_flipped_bit_changes_the_digest(content: bytes, data: st.DataObject) -> None:
    right = page_sum_digest([memoryview(content)])
    assert page_sum_digest([memoryview(content)]) == right
    flipped = bytearray(content)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    assert page_sum_digest([memoryview(flipped)]) != right


def test_pages_in_each_others_place_or_empty_change_the_digest() -> None:
    first, second = os.urandom(4096), os.urandom(4096)
    digests = {
        page_sum_digest([memoryview(content)])
        for content in (first + second, second + first, first + bytes(4096), bytes(8192))
    }
    assert len(digests) == 4


def test_every_expert_of_every_layer_has_its_digest(store: Store) -> None:
    for layer in store.manifest.layers:
        assert len(set(layer.digests[:-1])) == layer.num_experts
        experts = range(layer.num_experts)
        assert BlockVerifier(
            store, layer, store.map_layer(layer.index), experts
        ).verify_if_changed()


def test_a_damaged_expert_is_refused_by_name_and_the_others_serve(store: Store) -> None:
    flip(store, 0, expert=5)
    with pytest.raises(
        BlockCorrupted, match=r"store: layer 0, expert 5 of .*: got digest .*, expected"
    ):
        function(store, range(4, 8))
    function(store, range(4)).compute(request_for(1))


def test_damage_while_it_serves_is_found_before_an_answer_leaves(store: Store) -> None:
    serving = function(store, range(4))
    right = serving.compute(request_for(2))
    flip_back = flip(store, 0, expert=2)
    for _ in range(2):
        with pytest.raises(BlockCorrupted, match="expert 2"):
            serving.compute(request_for(2))
    flip_back()
    assert torch.equal(serving.compute(request_for(2)), right)
    flip(store, 0, expert=7)  # another function's
    assert torch.equal(serving.compute(request_for(2)), right)


def test_a_file_that_was_replaced_or_removed_leaves_what_is_mapped(store: Store) -> None:
    serving = function(store, range(4))
    right = serving.compute(request_for(2))
    path = file_of(store, 0)
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)
    assert torch.equal(serving.compute(request_for(2)), right)
    path.unlink()
    assert torch.equal(serving.compute(request_for(2)), right)


def test_what_was_verified_is_not_read_again_in_any_process_until_the_file_changes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, read = store.layer_entry(0), []

    def counted(parts: object) -> str:
        read.append(parts)
        return page_sum_digest(parts)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "page_sum_digest", counted)

    def check(memory: VerifiedBlocks) -> int:
        read.clear()
        BlockVerifier(
            store, layer, store.map_layer(0), range(3), verified_blocks=memory
        ).verify_if_changed()
        return len(read)

    memory = VerifiedBlocks(tmp_path / "verified")
    assert [check(memory), check(memory)] == [4, 0]
    assert check(VerifiedBlocks(tmp_path / "verified")) == 0  # another process
    assert check(VerifiedBlocks(None)) == 4
    os.utime(file_of(store, 0))
    assert check(memory) == 4


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    layer = store.layer_entry(0)
    for _ in range(2):
        memory = VerifiedBlocks(tmp_path / "file" / "verified")
        assert BlockVerifier(
            store, layer, store.map_layer(0), range(3), verified_blocks=memory
        ).verify_if_changed()
