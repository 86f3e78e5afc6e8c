"""checkov over a folder, with the checks that `.checkov.yaml` leaves in.

It lives in an environment of its own, `.venv-tools`, as its dependencies do not go with ours.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHECKOV = ROOT / ".venv-tools" / "bin" / "checkov"


def failed_checks(folder: Path, *, framework: str) -> list[str]:
    """Return the checks that failed in a folder, `ID RESOURCE: NAME`; at least one must pass."""
    if not CHECKOV.exists():
        pytest.fail(f"{CHECKOV} is missing: `make setup` makes it")
    command = [str(CHECKOV), "--config-file", str(ROOT / ".checkov.yaml"), "--quiet"]
    command += ["--directory", str(folder), "--framework", framework, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return _failures(json.loads(done.stdout))


def _failures(report: dict[str, Any]) -> list[str]:
    assert report["summary"]["passed"] > 0, report
    assert report["summary"]["parsing_errors"] == 0, report
    return [
        f"{check['check_id']} {check['resource']}: {check['check_name']}"
        for check in report["results"]["failed_checks"]
    ]
