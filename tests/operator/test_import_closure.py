"""What the processes of the control plane import: they start in parts of a second."""

import subprocess
import sys

import pytest

DATA_PLANE = {
    *("torch", "transformers", "accelerate", "numpy", "fastapi", "uvicorn", "safetensors"),
    *("faasmoe_router", "faasmoe_expert", "faasmoe_transformers"),
}


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("faasmoe_operator.cli", {"aiohttp", "kubernetes", "prometheus_client"}),
        ("faasmoe_operator.control.process", {"kubernetes"}),
    ],
)
def test_process_imports_nothing_of_the_data_plane(module: str, unused: set[str]) -> None:
    script = f"import sys; import {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "pydantic" in imported
    assert imported.isdisjoint(DATA_PLANE | unused)
