"""The comparison of a limited model with an unlimited one."""

import os
from pathlib import Path

import pytest
from benchmarks.evaluation import memory_group
from benchmarks.evaluation.client import RequestResult, WorkloadResult
from benchmarks.evaluation.limited import LimitedRun, compare, format_limited
from benchmarks.evaluation.memory_group import NoMemoryGroupError, drop_cached, limited_children
from benchmarks.evaluation.meter import MemorySample, ResourceUsage
from benchmarks.evaluation.run import StrategyRun

NAMES = ("calls", "local", "colocated", "sent_bytes", "received_bytes", "activations")
COUNTERS = dict.fromkeys(NAMES, 4.0)


def _result(number: int, text: str = "a b", error: str = "") -> RequestResult:
    if error:
        return RequestResult(0, number, error=error)
    return RequestResult(0, number, text=text, n_tokens=2, ttft_s=0.1, total_s=0.2)


def _run(
    *results: RequestResult, busy_s: float = 1.0, warm_up: tuple[RequestResult, ...] = ()
) -> LimitedRun:
    samples = [MemorySample(0.0, 1 << 30, 0), MemorySample(1.0, 1 << 30, 0)]
    usage = ResourceUsage(samples, cpu_s=1.0, time_s=1.0)
    run = StrategyRun(WorkloadResult(results, busy_s, busy_s), usage, COUNTERS)
    return LimitedRun(run, WorkloadResult(warm_up, 1.0, 1.0))


def test_ratio_is_of_the_same_repetition() -> None:
    unlimited = [_run(_result(0), busy_s=1.0), _run(_result(0), busy_s=4.0)]
    limited = [_run(_result(0), busy_s=2.0), _run(_result(0), busy_s=8.0)]
    figures = compare(unlimited, limited)
    assert figures["tokens_ratio"] == 0.5
    assert figures["failed"] == figures["changed"] == 0
    assert figures["equal_characters"] == 1.0


def test_failures_count_those_of_the_warm_up_and_have_no_text() -> None:
    limited = _run(_result(0), _result(1, error="late"), warm_up=(_result(0, error="late"),))
    figures = compare([_run(_result(0), _result(1))], [limited])
    assert figures["failed"] == 2
    assert figures["changed"] == 0
    assert figures["limited"][0]["errors"] == ["late"]
    assert figures["limited"][0]["colocated_per_token"] == 2.0


def test_changed_texts_are_counted_against_the_first_run_without_a_limit() -> None:
    unlimited = [_run(_result(0, "x"), _result(1, "y")), _run(_result(0, "x"), _result(1, "z"))]
    limited = [_run(_result(0, "x"), _result(1, "y")), _run(_result(0, "q"), _result(1, "z"))]
    figures = compare(unlimited, limited)
    assert figures["changed"] == 2
    assert figures["changed_unlimited"] == 1
    assert "changed 2 of 2 texts (1 between" in format_limited(figures)


def test_a_group_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_group, "own_memory_group", lambda: tmp_path / "none")
    with pytest.raises(NoMemoryGroupError, match=r"none.*No such file"), limited_children(1 << 30):
        pass


def test_children_live_in_a_limited_group_below_the_own_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a folder that stands for the controller, whose files appear with the group."""
    (tmp_path / "cgroup.procs").touch()
    make = Path.mkdir

    def mkdir(path: Path) -> None:
        make(path)
        (path / "memory.max").touch()
        (path / "cgroup.procs").touch()

    def rmdir(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        os.rmdir(path)

    monkeypatch.setattr(memory_group, "own_memory_group", lambda: tmp_path)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with limited_children(1 << 30) as group:
        assert group.parent == tmp_path
        assert (group / "memory.max").read_text() == str(1 << 30)
        assert (group / "cgroup.procs").read_text() == str(os.getpid())
        assert (tmp_path / "cgroup.procs").read_text() == ""
    assert (tmp_path / "cgroup.procs").read_text() == str(os.getpid())
    assert not group.exists()


def test_dropping_cached_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"weights")
    drop_cached(tmp_path)
    assert (tmp_path / "a" / "weights").read_bytes() == b"weights"
