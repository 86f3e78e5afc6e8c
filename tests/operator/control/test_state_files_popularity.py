import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from faasmoe_operator.control.function_stats import HALF_LIFE_S
from faasmoe_operator.control.state_files import (
    MAX_POPULARITY_BYTES,
    PopularityFile,
    popularity_path,
)

ROWS = {"0:0-2": 8.0, "1:3,4": 2.5}


def file_at(path: Path, *, now_s: float = 1000.0, digest: str = "sha256:0") -> PopularityFile:
    return PopularityFile(path, model_digest=digest, clock=lambda: now_s)


def test_is_beside_the_store_and_not_in_it(tmp_path: Path) -> None:
    path = popularity_path(tmp_path / "store")
    assert path == tmp_path / "store.state" / "popularity.json"


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "state" / "popularity.json"
    file_at(path).write(ROWS)
    assert file_at(path).read() == ROWS
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_decays_between_two_runs(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    file_at(path).write(ROWS)
    later = file_at(path, now_s=1000.0 + HALF_LIFE_S).read()
    assert later == {shape: pytest.approx(rows / 2) for shape, rows in ROWS.items()}


def test_ignores_the_counts_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    file_at(path).write(ROWS)
    assert file_at(path, digest="sha256:1").read() == {}


def test_a_missing_file_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert file_at(tmp_path / "none" / "p.json").read() == {}
    assert caplog.records == []


def popularity_text(**changes: Any) -> str:
    value = {"version": 1, "model_digest": "sha256:0", "written_at_s": 1.0, "rows": ROWS}
    return json.dumps({**value, **changes})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut-off"),
        pytest.param("[]", id="no-object"),
        pytest.param("{}", id="no-fields"),
        pytest.param("\x00\x01", id="binary"),
        pytest.param("[" * 100_000, id="nested"),
        pytest.param(popularity_text(rows=[1]), id="rows-in-a-list"),
        pytest.param(popularity_text(rows={"0:0": "many"}), id="rows-in-words"),
        pytest.param(popularity_text(rows={"0:0": -1}), id="negative"),
        pytest.param(popularity_text(rows={"0:0": float("nan")}), id="nan"),
        pytest.param(popularity_text(written_at_s="then"), id="time-in-words"),
        pytest.param("x" * (MAX_POPULARITY_BYTES + 1), id="huge"),
    ],
)
def test_a_damaged_file_is_empty_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    assert file_at(path).read() == {}
    assert str(path) in caplog.text
    file_at(path).write(ROWS)
    assert file_at(path).read() == ROWS


def test_a_failed_write_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("a file")
    with caplog.at_level(logging.WARNING):
        file_at(tmp_path / "state" / "p.json").write(ROWS)
    assert "cannot be written" in caplog.text


def test_a_write_syncs_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, fsync = [], os.fsync

    def record_fsync(fd: int) -> None:
        kinds.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record_fsync)
    file_at(tmp_path / "p.json").write(ROWS)
    assert kinds == ["file", "folder"]
