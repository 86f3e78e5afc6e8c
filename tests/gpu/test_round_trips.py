"""Round trips of rows between two processes' device memory, by every method of the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_rows_survive_every_round_trip_of_the_device(cuda: torch.device) -> None:
    command = [sys.executable, "-m", "benchmarks.cuda.round_trips", "cuda", "64", "--rounds", "5"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    missing = {kind for kind, by_size in found.items() if "failed" in by_size}
    assert len(found) == 4
    assert missing == (set() if cuda.type == "cuda" else {"CUDA IPC"})
