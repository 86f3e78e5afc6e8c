"""The router process checks its device before it reads anything else, and logs its dtype."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable


def test_missing_device_is_reported_first() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    settings = {"STORE": "/nowhere", "TABLE": "/nowhere/table.json", "DEVICE": "cuda"}
    result = subprocess.run(
        [sys.executable, "-m", "faasmoe_router"],
        env={
            **env,
            "CUDA_VISIBLE_DEVICES": "",
            **{f"FAASMOE_{name}": value for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "FAASMOE_DEVICE" in line]
    assert "FAASMOE_DEVICE: got 'cuda', expected cpu or auto: torch " in line
    assert "/nowhere" not in result.stderr


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("auto", "float32: this CPU has no fast products in bfloat16, the store's dtype"),
        ("bfloat16", "bfloat16: FAASMOE_DTYPE is set"),
    ],
)
def test_dtype_and_reason_are_logged_once(
    prepared_store: PreparedStore, tmp_path: Path, dtype: str, message: str
) -> None:
    store, table = prepared_store("mixtral", dtype="bfloat16"), tmp_path / "table.json"
    functions = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 3))
    table.write_text(json.dumps(RoutingTable(store.manifest.digest, 0, functions).to_json()))
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    settings = {"STORE": store.path, "TABLE": table, "DEVICE": "cpu", "DTYPE": dtype}
    result = subprocess.run(
        [sys.executable, "-m", "faasmoe_router"],
        env={
            **env,
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "FAASMOE_KERNELS": "off",
            **{f"FAASMOE_{name}": str(value) for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2  # the store has no tokenizer, which is read after the model
    assert "no tokenizer can be loaded" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "The router computes in" in line]
    assert line.endswith(message)
    kernels = "Kernels of the router: torch (switched off by FAASMOE_KERNELS=off)"
    assert (kernels in result.stderr) == message.startswith("float32")
