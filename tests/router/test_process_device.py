"""A router that is asked for a device that is not there says so before it looks at anything."""

import os
import subprocess
import sys


def test_a_device_that_is_not_there_is_told_at_the_start() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    settings = {"STORE": "/nowhere", "TABLE": "/nowhere/table.json", "DEVICE": "cuda"}
    ended = subprocess.run(
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
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if "FAASMOE_DEVICE" in line]
    (line,) = lines
    assert "FAASMOE_DEVICE: got 'cuda', expected cpu or auto: torch " in line
    assert "/nowhere" not in ended.stderr
