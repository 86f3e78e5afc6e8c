"""`faasmoe simulate` hands all options to the simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faasmoe_operator.cli import main

PROFILE = """
traffic:
  requestsPerDay: 240
  days: 0.04
  tenants: 5
  hourlyWeights: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
  promptTokens: {median: 100, p95: 200}
  outputTokens: {median: 10, p95: 20}
cluster: {nodes: 20, nodeMemory: 512Gi, nodeSpeed: 100, activationTimeoutSeconds: 900}
"""


def test_prints_the_options_of_the_simulator(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: faasmoe simulate")


def test_simulates_a_profile_and_writes_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    profile, out = tmp_path / "profile.yaml", tmp_path / "figures.json"
    profile.write_text(PROFILE)
    options = ["--geometry", "qwen3-235b", "--quantization", "int4", "--out", str(out)]
    assert main(["simulate", str(profile), *options]) == 0
    assert "GB-seconds per token" in capfd.readouterr().out
    figures = json.loads(out.read_text())
    assert set(figures["strategies"]) == {"functions", "whole-model", "resident"}
    for outcome in figures["strategies"].values():
        assert outcome["served"] + outcome["refused"] + outcome["unfinished"] == 10


def test_an_invalid_option_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,2,3\n")
    assert main(["simulate", str(trace), "--geometry", "gpt-5"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("faasmoe: error: --geometry: got 'gpt-5', expected qwen3-235b")
    assert len(error.splitlines()) == 1
