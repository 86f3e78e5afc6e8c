from pathlib import Path

import pytest

from faasmoe_operator.cli import bench, main
from faasmoe_operator.errors import CommandError

PROGRAM = """
import os, sys
import benchmarks.evaluation
print(sys.argv[1:], os.environ["PYTHONPATH"].split(os.pathsep)[0])
raise SystemExit(3)
"""


def _bundle(root: Path) -> Path:
    folder = root / "benchmarks" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text(PROGRAM)
    return root


def test_runs_benchmarks_of_checkout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "paper", "--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: faasmoe bench paper")


def test_forwards_options_and_exit_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _bundle(tmp_path)
    monkeypatch.setattr(bench, "ROOTS", (tmp_path / "none", root))
    monkeypatch.chdir("/")
    assert main(["bench", "paper", "--rounds", "2"]) == 3
    assert capfd.readouterr().out.strip() == f"['paper', '--rounds', '2'] {root}"


def test_finds_bundled_benchmarks(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "bundled")
    assert bench.find_benchmarks_root((tmp_path, root)) == root


def test_rejects_installation_without_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="was built without them"):
        bench.find_benchmarks_root((tmp_path,))
