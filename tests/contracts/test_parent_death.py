import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faasmoe_contracts.parent_death import PARENT_PID_ENV, ParentDeathError, die_with_parent

CHILD = """
import signal
from faasmoe_contracts.parent_death import die_with_parent
die_with_parent()
print("ready", flush=True)
signal.pause()
"""

PARENT = f"""
import os, subprocess, sys
environment = {{**os.environ, "{PARENT_PID_ENV}": str(os.getpid())}}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, env=environment)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_kills_the_child_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    deadline_s = time.monotonic() + 120
    while is_running(child):
        assert time.monotonic() < deadline_s, "the child outlived its parent"
        os.sched_yield()


def test_kills_a_child_whose_parent_died_before_the_call() -> None:
    environment = {**os.environ, PARENT_PID_ENV: "1"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, stdin=subprocess.DEVNULL
    )
    assert result.returncode == -9


def test_does_nothing_without_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT_PID_ENV, raising=False)
    die_with_parent()


def test_rejects_an_invalid_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT_PID_ENV, "me")
    with pytest.raises(
        ParentDeathError, match="FAASMOE_PARENT_PID: got 'me', expected a process id"
    ):
        die_with_parent()
