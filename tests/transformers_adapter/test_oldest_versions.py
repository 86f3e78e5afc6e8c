"""The table of private names resolves with the oldest supported transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from faasmoe_transformers.version_check import SUPPORTED_VERSIONS

PACKAGES = Path(__file__).parents[2] / "expert_fn"
INSTALL_TIMEOUT_S = 900
# By its exact pin: a wheel of this torch may lie on disk, other versions are fetched with CUDA.
TORCH = "torch==2.13.0"
SCRIPT = """
import torch, transformers
from faasmoe_transformers.version_check import check_private_names
check_private_names()
print(torch.__version__.partition("+")[0], transformers.__version__)
"""


def oldest(library: str) -> str:
    """Return the first version of a library's supported range."""
    (lower,) = (s for s in SpecifierSet(SUPPORTED_VERSIONS[library]) if s.operator == ">=")
    return f"{lower.version}.0"


@pytest.mark.slow
@pytest.mark.timeout(2 * INSTALL_TIMEOUT_S)
def test_the_table_resolves_with_the_oldest_supported_versions(tmp_path: Path) -> None:
    assert f"torch=={oldest('torch')}" == TORCH
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = (TORCH, f"transformers=={oldest('transformers')}", "accelerate>=1.15,<2")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages],
        check=True,
        timeout=INSTALL_TIMEOUT_S,
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    done = subprocess.run(
        [python, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [oldest("torch"), oldest("transformers")]
