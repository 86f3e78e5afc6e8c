"""Runs checkov on a folder, with the checks that `.checkov.yaml` enables.

checkov has its own environment, `.venv-tools`, because its dependencies conflict with ours.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHECKOV = ROOT / ".venv-tools" / "bin" / "checkov"


def failed_checks(folder: Path, *, framework: str) -> list[str]:
    """Return the failed checks as `ID RESOURCE: NAME`; at least one check must pass."""
    if not CHECKOV.exists():
        pytest.fail(f"{CHECKOV} is missing: run `make setup`")
    command = [str(CHECKOV), "--config-file", str(ROOT / ".checkov.yaml"), "--quiet"]
    command += ["--directory", str(folder), "--framework", framework, "--output", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return _failures(json.loads(result.stdout))


def _failures(report: dict[str, Any]) -> list[str]:
    assert report["summary"]["passed"] > 0, report
    assert report["summary"]["parsing_errors"] == 0, report
    return [
        f"{check['check_id']} {check['resource']}: {check['check_name']}"
        for check in report["results"]["failed_checks"]
    ]
