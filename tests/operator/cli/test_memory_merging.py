"""`faasmoe up --merge-memory`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faasmoe_operator.cli.memory_merging import merge_equal_pages
from faasmoe_operator.errors import CommandError

STATES = Path("/proc/self/ksm_stat")
MERGE = """
import subprocess, sys
from pathlib import Path
from faasmoe_operator.cli.memory_merging import merge_equal_pages
from faasmoe_operator.errors import CommandError

try:
    merge_equal_pages(ksm_run=Path(sys.argv[1]))
except CommandError as error:
    sys.exit(str(error))
subprocess.run(["cat", "/proc/self/ksm_stat"], check=True)
"""


def merges_any() -> bool:
    return STATES.exists() and "ksm_merge_any" in STATES.read_text()


@pytest.fixture
def switched_on(tmp_path: Path) -> Path:
    file = tmp_path / "run"
    file.write_text("1\n")
    return file


@pytest.mark.skipif(not merges_any(), reason="needs Linux 6.7 or later with KSM")
def test_programs_that_are_started_take_part(switched_on: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MERGE, str(switched_on)], capture_output=True, text=True
    )
    assert "ksm_merge_any: yes" in run.stdout, run.stderr


@pytest.mark.parametrize("state", ["0", "2"])
def test_a_kernel_that_merges_nothing_is_named_with_what_to_do(tmp_path: Path, state: str) -> None:
    file = tmp_path / "run"
    file.write_text(f"{state}\n")
    with pytest.raises(CommandError, match=f"--merge-memory: .*got {state}, expected 1.*echo 1 > "):
        merge_equal_pages(ksm_run=file)


def test_a_kernel_without_merging_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file or directory; expected a kernel that"):
        merge_equal_pages(ksm_run=tmp_path / "run")


def test_the_option_is_refused_before_anything_starts(tmp_path: Path) -> None:
    on = Path("/sys/kernel/mm/ksm/run")
    if on.exists() and on.read_text().strip() == "1":
        pytest.skip("this machine's kernel merges pages")
    command = [sys.executable, "-m", "faasmoe_operator.cli", "up", str(tmp_path), "--merge-memory"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert run.returncode == 2
    assert "faasmoe: error: --merge-memory: " in run.stderr
