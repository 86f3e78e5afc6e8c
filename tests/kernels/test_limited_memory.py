"""Experts of a mapped file that does not stay in memory: exact, and what is used often stays.

What a process has read and keeps is the process's, so each test has one of its own
(limited_memory_calls.py).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faasmoe_kernels import KernelLibrary

WORKER = Path(__file__).with_name("limited_memory_calls.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's page cache")


def run_worker(folder: Path, scenario: str) -> dict[str, Any]:
    """Run one scenario; skips where files are not on a disk."""
    command = [sys.executable, str(WORKER), str(folder / "experts"), scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    if not result["is_from_disk"]:
        pytest.skip(f"{folder} is not on a disk")
    return result


def test_sums_are_exact_and_what_is_used_often_stays(
    default_library: KernelLibrary, tmp_path: Path
) -> None:
    result = run_worker(tmp_path, "stay")
    assert result["is_equal"]
    resident = result["resident"]
    assert min(resident[:2]) > 0.9, "used by each call"
    assert sum(part > 0.1 for part in resident) <= 14, "the last call used all 24"


def test_what_others_read_from_the_disk_is_no_lack_of_memory(
    default_library: KernelLibrary, tmp_path: Path
) -> None:
    assert min(run_worker(tmp_path, "read_beside")["resident"]) == 1.0


def test_a_truncated_file_ends_no_process(default_library: KernelLibrary, tmp_path: Path) -> None:
    assert run_worker(tmp_path, "truncate")["is_damaged"]
