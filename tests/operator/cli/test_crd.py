from pathlib import Path

import pytest
import yaml

from faasmoe_operator.cli import main

FILE = "faasmoe.dev_moemodels.yaml"


def test_prints_crd(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crd"]) == 0
    names = [crd["metadata"]["name"] for crd in yaml.safe_load_all(capsys.readouterr().out)]
    assert names == ["moemodels.faasmoe.dev", "tenants.faasmoe.dev"]


def test_written_crd_passes_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "crds"
    assert main(["crd", "--output", str(folder)]) == 0
    assert main(["crd", "--check", str(folder)]) == 0
    assert capsys.readouterr().out == ""
    (folder / FILE).write_text("kind: Other\n")
    assert main(["crd", "--check", str(folder)]) == 1
    assert f"`faasmoe crd --output {folder}` writes it" in capsys.readouterr().err


def test_reports_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crd", "--check", str(tmp_path)]) == 1
    assert f"--check: {tmp_path / FILE} cannot be read: No such file" in capsys.readouterr().err


def test_reports_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["crd", "--output", str(tmp_path / "file")]) == 1
    assert "cannot be written: " in capsys.readouterr().err
