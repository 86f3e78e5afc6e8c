"""The whole comparison with llama.cpp's server, with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.worker import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)  # pip makes the peer's environment the first time
def test_both_servers_answer_and_are_compared(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "benchmarks.peers", "--quick", "--out", str(tmp_path))
    options = ("--models", "tiny", "--precisions", "bf16,int8", "--concurrency", "1,2")
    subprocess.run((*command, *options), cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "peers.json").read_text())
    assert figures["tiny_tokens_ratio"]["bf16"].keys() == {"1", "2"}
    assert figures["tiny_ttft_ratio"]["bf16"].keys() == {"1"}
    assert figures["greedy_agreement"]["tiny"]["llama.cpp"]["first_tokens"] >= 0.5
    refused = {(entry["server"], entry["precision"]) for entry in figures["not_served"]}
    assert refused <= {("FaaSMoE", "int8")}
    for server in figures["servers"]:
        assert server["pss_mib"]["median"] > 10
        assert server["start_s"]["median"] > 0
        assert all(b["cpu_ms_per_token"]["median"] > 0 for b in server["batches"].values())
