"""Traces and profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.traffic import TrafficSpec, draw_traffic, load_profile, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,396,109
"""
SPEC = {
    "requestsPerDay": 2000,
    "days": 0.25,
    "tenants": 10,
    "hourlyWeights": [1] * 24,
    "promptTokens": {"median": 100, "p95": 400, "max": 1000},
    "outputTokens": {"median": 50, "p95": 200, "max": 500},
}


def test_reads_an_azure_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(AZURE)
    traffic = read_trace(file)
    assert [(r.n_prompt, r.n_output) for r in traffic.requests] == [(374, 44), (396, 109)]
    assert [r.arrival_s for r in traffic.requests] == pytest.approx([0.0, 0.052])
    assert traffic.duration_s == pytest.approx(0.052)


def test_reads_json_lines_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"arrival_s": 2.5, "prompt_tokens": 0, "output_tokens": 3, "tenant": "b"}\n'
        '{"arrival_s": 1, "prompt_tokens": 7, "output_tokens": 2, "tenant": "a"}\n'
    )
    first, second = read_trace(file).requests
    assert (first.tenant, first.number, first.n_prompt) == ("a", 0, 7)
    assert (second.arrival_s, second.n_prompt) == (2.5, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("arrival_s,prompt_tokens,output_tokens\n", "expected one or more", id="empty"),
        pytest.param(
            "arrival_s,prompt_tokens\n1,2\n", "trace line 2: .*expected output_tokens", id="column"
        ),
        pytest.param(
            "arrival_s,prompt_tokens,output_tokens\nsoon,1,1\n",
            "trace line 2 TIMESTAMP: got 'soon'",
            id="time",
        ),
        pytest.param(
            "arrival_s,prompt_tokens,output_tokens\n1,-4,1\n",
            "trace line 2 prompt_tokens: got '-4'",
            id="tokens",
        ),
        pytest.param("{not json\n", "trace line 1: .*expected a JSON object", id="json"),
    ],
)
def test_names_the_line_of_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(SimulationError, match=message):
        read_trace(file)


def test_the_same_seed_draws_the_same_traffic() -> None:
    spec = TrafficSpec.model_validate(SPEC)
    one, again, other = (draw_traffic(spec, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_draws_what_the_profile_asks_for() -> None:
    traffic = draw_traffic(TrafficSpec.model_validate(SPEC), seed=3)
    prompts = sorted(r.n_prompt for r in traffic.requests)
    assert len(prompts) == 500
    assert traffic.duration_s == 6 * 3600
    assert prompts[250] == pytest.approx(100, rel=0.2)
    assert prompts[-1] <= 1000
    counts = [sum(r.tenant == f"tenant-{n}" for r in traffic.requests) for n in (0, 9)]
    assert counts[0] > 3 * counts[1] > 0


def test_names_each_invalid_field_of_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text("cluster: {nodes: 0, nodeMemory: much, speed: 1}\n")
    with pytest.raises(SimulationError) as error:
        load_profile(file)
    assert all(name in str(error.value) for name in ("nodes", "nodeMemory", "speed"))
