"""Runs vLLM for tests: it has an environment of its own, which FAASMOE_VLLM_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

VLLM_PYTHON = os.environ.get("FAASMOE_VLLM_PYTHON", "")
GENERATE = Path(__file__).resolve().parent.parent / "vllm_engine" / "generate.py"
TIMEOUT_S = 600
NEEDS_VLLM = (
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON, reason="FAASMOE_VLLM_PYTHON is not set; `make test-vllm-engine` sets it"
    ),
)


def run_vllm(request: dict[str, Any], **variables: str) -> Any:
    """Run tests/vllm_engine/generate.py; return what it printed last.

    Args:
        request: its request.
        variables: further environment variables.
    """
    process = subprocess.run(
        [VLLM_PYTHON, str(GENERATE), json.dumps(request)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(process.stdout.splitlines()[-1])
