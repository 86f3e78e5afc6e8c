import os
import subprocess
import sys
from pathlib import Path

import pytest

from faasmoe_operator.cli import main
from faasmoe_operator.cli.runtime import Running, announce, find_running, runtime_folder
from faasmoe_operator.errors import CommandError


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "faasmoe"


def running(name: str = "tiny", *, pid: int | None = None) -> Running:
    return Running(name, f"/{name}.yaml", pid or os.getpid(), "http://127.0.0.1:1", "secret")


def pid_of_nobody() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    return ended.pid


def test_what_runs_is_found_and_what_ended_is_not() -> None:
    assert find_running() == []
    with runtime_folder() as one, runtime_folder() as other:
        announce(running("one"), one)
        announce(running("other"), other)
        assert {entry.name for entry in find_running()} == {"one", "other"}
    assert find_running() == []


def test_is_private(base: Path) -> None:
    with runtime_folder() as folder:
        announce(running(), folder)
        assert base.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "control.json").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_one_left_is_not_found_and_then_removed(base: Path) -> None:
    left = base / "up-left"
    left.mkdir(parents=True)
    base.chmod(0o700)
    announce(running(pid=pid_of_nobody()), left)
    assert find_running() == []
    with runtime_folder():
        assert not left.exists()


def test_does_not_mind_folders_that_hold_nothing_or_nonsense(base: Path) -> None:
    base.mkdir(mode=0o700)
    (base / "up-empty").mkdir()
    (base / "up-nonsense").mkdir()
    (base / "up-nonsense" / "control.json").write_text("[1]")
    assert find_running() == []


def test_refuses_a_folder_that_others_can_enter(base: Path) -> None:
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(CommandError, match="expected a folder of our own"):
        find_running()


def test_top_says_that_none_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 1
    assert capsys.readouterr().err == "faasmoe: error: faasmoe up: none runs\n"


def test_top_asks_which_of_several_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with runtime_folder() as one, runtime_folder() as other:
        announce(running("one"), one)
        announce(running("other"), other)
        assert main(["top", "--once"]) == 1
        assert "several run: " in capsys.readouterr().err
        assert main(["top", "--once", "-f", "/one.yaml"]) == 1
        assert "control http://127.0.0.1:1: " in capsys.readouterr().err
