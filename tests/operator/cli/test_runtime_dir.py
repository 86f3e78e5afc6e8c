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


def test_lists_running_instances_only() -> None:
    assert list_instances() == []
    with private_runtime_dir() as one, private_runtime_dir() as other:
        register_instance(make_instance("one"), one)
        register_instance(make_instance("other"), other)
        assert {instance.name for instance in list_instances()} == {"one", "other"}
    assert list_instances() == []


def test_folders_and_files_are_private(runtime_base: Path) -> None:
    with private_runtime_dir() as folder:
        register_instance(make_instance(), folder)
        assert runtime_base.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "control.json").stat().st_mode & 0o777 == 0o600


def test_ignores_then_removes_folder_of_killed_instance(runtime_base: Path) -> None:
    stale = runtime_base / "up-stale"
    stale.mkdir(parents=True)
    runtime_base.chmod(0o700)
    register_instance(make_instance(pid=unused_pid()), stale)
    assert list_instances() == []
    with private_runtime_dir():
        assert not stale.exists()


def test_ignores_folders_without_valid_instance_file(runtime_base: Path) -> None:
    runtime_base.mkdir(mode=0o700)
    (runtime_base / "up-empty").mkdir()
    (runtime_base / "up-invalid").mkdir()
    (runtime_base / "up-invalid" / "control.json").write_text("[1]")
    assert list_instances() == []


def test_rejects_folder_accessible_to_others(runtime_base: Path) -> None:
    runtime_base.mkdir()
    runtime_base.chmod(0o755)
    with pytest.raises(CommandError, match="inaccessible to others"):
        list_instances()


def test_top_reports_that_no_instance_is_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 1
    assert capsys.readouterr().err == "faasmoe: error: faasmoe up: no instance is running\n"


def test_a_command_of_one_model_requires_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with private_runtime_dir() as one, private_runtime_dir() as other:
        register_instance(make_instance("one"), one)
        register_instance(make_instance("other"), other)
        assert main(["explain"]) == 1
        assert "several models are running, expected one of " in capsys.readouterr().err
        assert main(["explain", "-f", "/one.yaml"]) == 1
        assert "control http://127.0.0.1:1: " in capsys.readouterr().err
