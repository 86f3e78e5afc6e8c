"""Interrupted, repeated and concurrent preparations result in the same store."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.reference_digests import Block, CheckpointReader
from faasmoe_router.errors import PrepareError, WeightsNotFinite

MakeCheckpoint = Callable[..., Path]

_KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from faasmoe_router.checkpoint.prepare import prepare

class KillAfter:
    remaining_bytes = int(sys.argv[3])
    def start(self, label, *, total_bytes):
        pass
    def advance(self, size_bytes):
        self.remaining_bytes -= size_bytes
        if self.remaining_bytes < 0:
            os.kill(os.getpid(), signal.SIGKILL)

prepare(sys.argv[1], Path(sys.argv[2]), progress=KillAfter())
"""


class _Interrupted(Exception):
    pass


class _InterruptAfter:
    def __init__(self, size_bytes: int) -> None:
        self._remaining_bytes = size_bytes

    def start(self, label: str, *, total_bytes: int) -> None:
        assert label
        assert total_bytes

    def advance(self, size_bytes: int) -> None:
        self._remaining_bytes -= size_bytes
        if self._remaining_bytes < 0:
            raise _Interrupted


def test_preparation_resumes_after_sigkill(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, environment: dict[str, str]
) -> None:
    checkpoint = make_checkpoint()
    expected = prepare(str(checkpoint), tmp_path / "expected")
    expert_bytes = expected.manifest.files["experts/00001.safetensors"].size_bytes
    size_bytes = sum(
        entry.size_bytes for name, entry in expected.manifest.files.items() if "model/" not in name
    )
    resumed = tmp_path / "resumed"
    arguments = [str(checkpoint), str(resumed), str(size_bytes - expert_bytes // 2)]
    child = subprocess.run([sys.executable, "-c", _KILL_SCRIPT, *arguments], env=environment)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(StoreError, match=r"manifest\.json: not found"):
        Store.open(resumed)
    inode = (resumed / "experts/00000.safetensors").stat().st_ino
    assert not (resumed / "experts/00001.safetensors").exists()

    store = prepare(str(checkpoint), resumed)
    assert store.manifest.digest == expected.manifest.digest
    assert (resumed / "experts/00000.safetensors").stat().st_ino == inode
    assert not list(resumed.rglob("*.partial"))
    assert not (resumed / ".journal").exists()


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    interrupt_bytes=st.lists(st.integers(0, 120_000), max_size=3), truncate_journal=st.booleans()
)
def test_preparation_resumes_after_any_interruption(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    interrupt_bytes: list[int],
    truncate_journal: bool,
) -> None:
    checkpoint = tmp_path / "checkpoint"  # shared by all examples
    if not checkpoint.exists():
        make_checkpoint()
    folder = tmp_path_factory.mktemp("stores")
    for size_bytes in interrupt_bytes:
        try:
            prepare(str(checkpoint), folder / "store", progress=_InterruptAfter(size_bytes))
        except _Interrupted:
            if truncate_journal:
                with (folder / "store/.journal").open("a") as journal:
                    journal.write('{"file": "exp')
    store = prepare(str(checkpoint), folder / "store")
    store.verify()
    assert store.manifest.digest == prepare(str(checkpoint), tmp_path / "once").manifest.digest


def test_preparation_by_reference_reads_only_what_is_left(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(dtype=torch.bfloat16)
    once = prepare(str(checkpoint), tmp_path / "once", mode=StoreMode.AUTO)
    assert once.manifest.checkpoint is not None
    size_bytes = once.manifest.checkpoint.size_bytes
    resumed = tmp_path / "resumed"
    for part in (0.3, 0.7):
        interrupt = _InterruptAfter(int(part * size_bytes))
        with pytest.raises(_Interrupted):
            prepare(str(checkpoint), resumed, mode=StoreMode.AUTO, progress=interrupt)

    read_bytes: list[int] = []
    digest = CheckpointReader._digest

    def count(self: CheckpointReader, block: Block) -> str:
        read_bytes.append(block.size_bytes)
        return digest(self, block)

    monkeypatch.setattr(CheckpointReader, "_digest", count)
    progress = _Total()
    store = prepare(str(checkpoint), resumed, mode=StoreMode.AUTO, progress=progress)
    assert store.manifest.digest == once.manifest.digest
    assert 0 < sum(read_bytes) < 0.7 * size_bytes
    assert progress.size_bytes >= size_bytes  # what is known counts as done
    assert not (resumed / ".journal").exists()


def test_weights_that_were_not_checked_are_read_again(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(dtype=torch.bfloat16), tmp_path / "store"
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if "experts" in name)
    tensors[name].fill_(torch.inf)
    save_file(tensors, weights, metadata={"format": "pt"})
    size_bytes = weights.stat().st_size
    with pytest.raises(_Interrupted):
        prepare(
            str(checkpoint),
            path,
            mode=StoreMode.AUTO,
            allows_nonfinite=True,
            progress=_InterruptAfter(size_bytes * 9 // 10),
        )
    with pytest.raises(WeightsNotFinite):
        prepare(str(checkpoint), path, mode=StoreMode.AUTO)


class _Total:
    def __init__(self) -> None:
        self.size_bytes = 0

    def start(self, label: str, *, total_bytes: int) -> None:
        assert label

    def advance(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes


def test_damaged_finished_file_is_rewritten(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    with pytest.raises(_Interrupted):
        prepare(str(checkpoint), path, progress=_InterruptAfter(100_000))
    finished = sorted(path.rglob("*.safetensors"))
    content = bytearray(finished[0].read_bytes())
    content[-1] ^= 1
    finished[0].write_bytes(content)
    prepare(str(checkpoint), path).verify()


def test_interrupted_store_of_another_checkpoint_is_replaced(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(_Interrupted):
        prepare(str(make_checkpoint()), tmp_path / "store", progress=_InterruptAfter(100_000))
    store = prepare(str(make_checkpoint("mixtral", name="other")), tmp_path / "store")
    assert store.manifest.model.family == "mixtral"
    store.verify()


def test_complete_store_is_left_unchanged(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    prepare(str(checkpoint), path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != ".lock"}
    prepare(str(checkpoint), path)
    after = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != ".lock"}
    assert after == before


def test_damaged_complete_store_is_rejected_unless_forced(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    prepare(str(checkpoint), path)
    file = path / "experts/00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"00001\.safetensors: sha256: got"):
        prepare(str(checkpoint), path)
    prepare(str(checkpoint), path, force=True).verify()


def test_store_of_another_source_is_rejected_unless_forced(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    first, other = make_checkpoint(), make_checkpoint("mixtral", name="other")
    path = tmp_path / "store"
    prepare(str(first), path)
    with pytest.raises(PrepareError, match=f"prepared from '{first}'.*--force"):
        prepare(str(other), path)
    assert Store.open(path).manifest.model.family == "qwen2_moe"
    assert prepare(str(other), path, force=True).manifest.model.family == "mixtral"


@pytest.mark.parametrize("change", ["dtype", "weights"])
def test_changed_checkpoint_or_dtype_is_another_source(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: str
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    prepare(str(checkpoint), path)
    if change == "weights":
        weights = checkpoint / "model.safetensors"
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    with pytest.raises(PrepareError, match="--force"):
        prepare(str(checkpoint), path, dtype="bfloat16" if change == "dtype" else None)


@pytest.mark.parametrize("force", [True, False])
def test_folder_with_foreign_files_is_left_unchanged(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, force: bool
) -> None:
    path = tmp_path / "home"
    (path / "experts").mkdir(parents=True)
    (path / "experts" / "thesis.txt").write_text("years")
    with pytest.raises(PrepareError, match=r"home with experts in it, expected an empty folder"):
        prepare(str(make_checkpoint()), path, force=force)
    assert (path / "experts" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("force", [False, True])
def test_foreign_manifest_is_left_unchanged(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, force: bool
) -> None:
    site = tmp_path / "site"
    (site / "model").mkdir(parents=True)
    (site / "model" / "precious.txt").write_text("years of work")
    (site / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises((PrepareError, StoreError), match="manifest"):
        prepare(str(make_checkpoint()), site, force=force)
    assert (site / "manifest.json").exists()
    assert (site / "model" / "precious.txt").exists()


def test_lost_and_found_folder_is_ignored(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "store" / "lost+found").mkdir(parents=True)
    prepare(str(make_checkpoint()), tmp_path / "store").verify()


def test_concurrent_preparation_is_rejected(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    path.mkdir()
    with (path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="being prepared by another process"):
            prepare(str(checkpoint), path)
    prepare(str(checkpoint), path).verify()


def test_unwritable_store_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match=r"file/store cannot be written: Not a directory"):
        prepare(str(make_checkpoint()), tmp_path / "file" / "store")
