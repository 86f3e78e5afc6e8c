"""Interrupted, repeated and concurrent preparations end in the same store."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faasmoe_contracts.store import Store, StoreError
from faasmoe_router.checkpoint import PrepareError, prepare

MakeCheckpoint = Callable[..., Path]

_KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from faasmoe_router.checkpoint import prepare

class KillAfter:
    left = int(sys.argv[3])
    def start(self, label, *, total_bytes):
        pass
    def advance(self, size_bytes):
        self.left -= size_bytes
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

prepare(sys.argv[1], Path(sys.argv[2]), progress=KillAfter())
"""


class _Interrupted(Exception):
    pass


class _InterruptAfter:
    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes

    def start(self, label: str, *, total_bytes: int) -> None:
        assert label
        assert total_bytes

    def advance(self, size_bytes: int) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise _Interrupted


def test_killed_in_the_middle_and_repeated(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, environment: dict[str, str]
) -> None:
    checkpoint = make_checkpoint()
    whole = prepare(str(checkpoint), tmp_path / "whole")
    expert_bytes = whole.manifest.files["experts/00001.safetensors"].size_bytes
    size_bytes = sum(
        entry.size_bytes for name, entry in whole.manifest.files.items() if "model/" not in name
    )
    again = tmp_path / "again"
    arguments = [str(checkpoint), str(again), str(size_bytes - expert_bytes // 2)]
    child = subprocess.run([sys.executable, "-c", _KILL_SCRIPT, *arguments], env=environment)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(StoreError, match="not there"):
        Store.open(again)
    finished = (again / "experts/00000.safetensors").stat().st_ino
    assert not (again / "experts/00001.safetensors").exists()

    store = prepare(str(checkpoint), again)
    assert store.manifest.digest == whole.manifest.digest
    assert (again / "experts/00000.safetensors").stat().st_ino == finished
    assert not list(again.rglob("*.partial"))
    assert not (again / ".journal").exists()


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stops=st.lists(st.integers(0, 120_000), max_size=3), torn=st.booleans())
def test_interrupted_anywhere_and_repeated(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
    torn: bool,
) -> None:
    checkpoint = tmp_path / "checkpoint"  # one for all examples
    if not checkpoint.exists():
        make_checkpoint()
    folder = tmp_path_factory.mktemp("stores")
    for stop in stops:
        try:
            prepare(str(checkpoint), folder / "store", progress=_InterruptAfter(stop))
        except _Interrupted:
            if torn:
                with (folder / "store/.journal").open("a") as journal:
                    journal.write('{"file": "exp')
    store = prepare(str(checkpoint), folder / "store")
    store.verify()
    assert store.manifest.digest == prepare(str(checkpoint), tmp_path / "once").manifest.digest


def test_a_finished_file_that_was_damaged_meanwhile_is_made_again(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    with pytest.raises(_Interrupted):
        prepare(str(checkpoint), path, progress=_InterruptAfter(100_000))
    done = sorted(path.rglob("*.safetensors"))
    content = bytearray(done[0].read_bytes())
    content[-1] ^= 1
    done[0].write_bytes(content)
    prepare(str(checkpoint), path).verify()


def test_an_interrupted_store_of_another_checkpoint_starts_anew(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(_Interrupted):
        prepare(str(make_checkpoint()), tmp_path / "store", progress=_InterruptAfter(100_000))
    store = prepare(str(make_checkpoint("mixtral", name="other")), tmp_path / "store")
    assert store.manifest.model.family == "mixtral"
    store.verify()


def test_a_complete_store_is_left_as_it_is(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    prepare(str(checkpoint), path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != ".lock"}
    prepare(str(checkpoint), path)
    after = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != ".lock"}
    assert after == before


def test_a_damaged_complete_store_is_named_and_can_be_forced(
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


def test_another_source_is_refused_unless_forced(
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
def test_a_changed_checkpoint_or_option_is_another_source(
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
def test_a_folder_with_other_files_is_never_touched(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, force: bool
) -> None:
    path = tmp_path / "home"
    (path / "experts").mkdir(parents=True)
    (path / "experts" / "thesis.txt").write_text("years")
    with pytest.raises(PrepareError, match=r"home with experts in it, expected an empty folder"):
        prepare(str(make_checkpoint()), path, force=force)
    assert (path / "experts" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("force", [False, True])
def test_a_manifest_of_something_else_is_never_removed(
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


def test_a_fresh_volume_counts_as_empty(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "store" / "lost+found").mkdir(parents=True)
    prepare(str(make_checkpoint()), tmp_path / "store").verify()


def test_two_at_once_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, path = make_checkpoint(), tmp_path / "store"
    path.mkdir()
    with (path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="being prepared by another process"):
            prepare(str(checkpoint), path)
    prepare(str(checkpoint), path).verify()


def test_a_store_that_cannot_be_written_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match=r"file/store cannot be written: Not a directory"):
        prepare(str(make_checkpoint()), tmp_path / "file" / "store")
