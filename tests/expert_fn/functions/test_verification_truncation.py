"""A store file that is rewritten in place or truncated ends no process that has it mapped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Dtype, ExpertRequest, FrameHeader, FrameKind, OutputMode
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_expert.functions import ExpertFunction, verification
from faasmoe_expert.functions.verification import VerifiedBlocks
from faasmoe_kernels import KernelsUnavailable, load

EXPERTS = [0, 1, 2]


def are_kernels_available() -> bool:
    try:
        load()
    except KernelsUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not are_kernels_available(), reason="the guard is part of the kernel library"
)


@pytest.fixture(params=["copy", "reference"])
def file(
    request: pytest.FixtureRequest,
    prepared_store: PreparedStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The file of a layer in a copy of a store, or of the checkpoint that it refers to."""
    verified_blocks = VerifiedBlocks(None)
    monkeypatch.setattr(verification, "process_verified_blocks", lambda: verified_blocks)
    prepared = prepared_store("mixtral", mode=request.param)
    shutil.copytree(prepared.path.parent, tmp_path / "model")
    (mapped,) = Store.open(tmp_path / "model" / prepared.path.name).map_layer(0).files
    return mapped.path


def map_function(file: Path) -> ExpertFunction:
    folder = next(p for p in file.parents if (p / "store").exists())
    store = Store.open(folder / "store")
    return ExpertFunction(make_function_spec(store, [0], EXPERTS), store)


def compute(function: ExpertFunction) -> torch.Tensor:
    return function.compute(request_for(EXPERTS))


def request_for(experts: list[int]) -> ExpertRequest:
    n = len(experts)
    header = FrameHeader(FrameKind.REQUEST, Dtype.FLOAT32, OutputMode.REDUCED, 0, n, n, 32)
    return ExpertRequest(
        header,
        np.arange(n, dtype=np.int32),
        np.array(experts, dtype=np.int32),
        np.ones(n, dtype=np.float32),
        memoryview(bytearray(np.ones((n, 32), dtype=np.float32).tobytes())),
    )


def test_identical_bytes_written_in_place_change_nothing(file: Path) -> None:
    function = map_function(file)
    expected, content = compute(function), file.read_bytes()
    for _ in range(3):
        with file.open("wb") as target:  # truncates, as cp does
            target.flush()
            with pytest.raises(BlockCorrupted):
                compute(function)
            target.write(content)
        assert torch.equal(compute(function), expected)


@pytest.mark.parametrize("kept", [0.0, 0.05])
def test_a_truncated_file_is_refused_until_it_is_whole_again(file: Path, kept: float) -> None:
    function = map_function(file)
    expected, content = compute(function), file.read_bytes()
    with file.open("r+b") as target:
        target.truncate(int(len(content) * kept))
    for _ in range(3):
        with pytest.raises(BlockCorrupted):
            compute(function)
    file.write_bytes(content)
    assert torch.equal(compute(function), expected)


def test_a_truncated_file_that_is_replaced_is_mapped_anew_by_a_new_function(file: Path) -> None:
    function = map_function(file)
    expected, content = compute(function), file.read_bytes()
    with file.open("r+b") as target:
        target.truncate(0)
    with pytest.raises(BlockCorrupted):
        compute(function)
    replacement = file.with_name("new")
    replacement.write_bytes(content)
    replacement.replace(file)
    with pytest.raises(BlockCorrupted):
        compute(function)
    assert torch.equal(compute(map_function(file)), expected)
