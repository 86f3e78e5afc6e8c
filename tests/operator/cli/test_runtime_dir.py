import os
import subprocess
import sys
from pathlib import Path

import pytest

from faasmoe_operator.cli import main
from faasmoe_operator.cli.runtime_dir import (
    LocalInstance,
    list_instances,
    private_runtime_dir,
    register_instance,
)
from faasmoe_operator.errors import CommandError


@pytest.fixture(autouse=True)
def runtime_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "faasmoe"


def make_instance(name: str = "tiny", *, pid: int | None = None) -> LocalInstance:
    return LocalInstance(name, f"/{name}.yaml", pid or os.getpid(), "http://127.0.0.1:1", "secret")


def unused_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as finished:
        pass
    return finished.pid


def test_what_runs_is_found_and_what_ended_is_not() -> None:
    assert list_instances() == []
    with private_runtime_dir() as one, private_runtime_dir() as other:
        register_instance(make_instance("one"), one)
        register_instance(make_instance("other"), other)
        assert {entry.name for entry in list_instances()} == {"one", "other"}
    assert list_instances() == []


def test_is_private(runtime_base: Path) -> None:
    with private_runtime_dir() as folder:
        register_instance(make_instance(), folder)
        assert runtime_base.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "control.json").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_one_left_is_not_found_and_then_removed(runtime_base: Path) -> None:
    left = runtime_base / "up-left"
    left.mkdir(parents=True)
    runtime_base.chmod(0o700)
    register_instance(make_instance(pid=unused_pid()), left)
    assert list_instances() == []
    with private_runtime_dir():
        assert not left.exists()


def test_does_not_mind_folders_that_hold_nothing_or_nonsense(runtime_base: Path) -> None:
    runtime_base.mkdir(mode=0o700)
    (runtime_base / "up-empty").mkdir()
    (runtime_base / "up-nonsense").mkdir()
    (runtime_base / "up-nonsense" / "control.json").write_text("[1]")
    assert list_instances() == []


def test_refuses_a_folder_that_others_can_enter(runtime_base: Path) -> None:
    runtime_base.mkdir()
    runtime_base.chmod(0o755)
    with pytest.raises(CommandError, match="expected a folder of our own"):
        list_instances()


def test_top_says_that_none_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 1
    assert capsys.readouterr().err == "faasmoe: error: faasmoe up: no instance is running\n"


def test_top_asks_which_of_several_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with private_runtime_dir() as one, private_runtime_dir() as other:
        register_instance(make_instance("one"), one)
        register_instance(make_instance("other"), other)
        assert main(["top", "--once"]) == 1
        assert "several instances are running: " in capsys.readouterr().err
        assert main(["top", "--once", "-f", "/one.yaml"]) == 1
        assert "control http://127.0.0.1:1: " in capsys.readouterr().err
