import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from faasmoe_contracts.atomic_file import quarantine, write_atomically


def test_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    inode = path.stat().st_ino
    write_atomically(path, b"new \xff")
    assert path.read_bytes() == b"new \xff"
    assert path.stat().st_ino != inode
    assert os.listdir(tmp_path) == ["state.json"]


def test_syncs_the_file_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, fsync = tmp_path / "state.json", [], os.fsync

    def record_fsync(fd: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))
        fsync(fd)

    monkeypatch.setattr("faasmoe_contracts.atomic_file.os.fsync", record_fsync)
    write_atomically(path, "content")
    assert synced == [(False, False), (True, True)]


def test_a_file_system_that_cannot_sync_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr("faasmoe_contracts.atomic_file.os.fsync", refuse_folders)
    write_atomically(tmp_path / "state.json", "content")
    assert (tmp_path / "state.json").read_text() == "content"


def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def disk_full(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("faasmoe_contracts.atomic_file.os.fsync", disk_full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_sets_the_mode_before_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "default", "")
        write_atomically(tmp_path / "secret", "", 0o600)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "default").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_uses_the_given_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, fsync = [], os.fsync

    def record_names(fd: int) -> None:
        names.append(os.listdir(tmp_path))
        fsync(fd)

    monkeypatch.setattr("faasmoe_contracts.atomic_file.os.fsync", record_names)
    write_atomically(tmp_path / "a", "", temp_path=tmp_path / "a.partial")
    assert names == [["a.partial"], ["a"]]


def test_concurrent_writers_do_not_mix_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    contents = [character * 100_000 for character in "abcd"]

    def write(content: str) -> None:
        for _ in range(5):
            write_atomically(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["state.json"]


def test_quarantine_moves_a_file_aside_and_replaces_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    for content in ("first", "second"):
        path.write_text(content)
        assert quarantine(path) == tmp_path / "usage.damaged"
    assert (tmp_path / "usage.damaged").read_text() == "second"
    assert not path.exists()
