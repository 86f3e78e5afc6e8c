"""Ratios, agreement and tables of the comparison with other servers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from benchmarks.peers.comparison import (
    Cell,
    agreement,
    agreements,
    best_ratios,
    disagreements,
    ratio_figures,
    visit_order,
)
from benchmarks.peers.servers import cpu_used_s
from benchmarks.peers.tables import overview_table, ratio_table, server_table
from benchmarks.peers.visit import BatchFigures, Visit

TOKENS = (("a", "b"), ("c", "d"))


def _visit(speed: float, ttft_ms: float | None = 100.0, tokens: object = TOKENS) -> Visit:
    batches = {
        c: BatchFigures(speed * c, 50.0, 10.0, 20.0, ttft_ms if c == 1 else None) for c in (1, 8)
    }
    return Visit(2.0, 1 << 20, batches, tokens)  # type: ignore[arg-type]


def _visits(
    ours: Sequence[float], theirs: Sequence[float], model: str = "qwen"
) -> dict[Cell, list[Visit]]:
    return {
        Cell("FaaSMoE", model, "bf16"): [_visit(speed) for speed in ours],
        Cell("llama.cpp", model, "bf16"): [_visit(speed, 50.0) for speed in theirs],
    }


def test_ratios_are_of_the_same_round() -> None:
    figures = ratio_figures(_visits([1.0, 2.0, 30.0], [2.0, 8.0, 30.0]))
    assert figures["tokens_ratio"]["bf16"] == {"1": 0.5, "8": 0.5}
    assert figures["ttft_ratio"]["bf16"] == {"1": 2.0}
    spread = figures["spread"]["tokens_ratio"]["bf16"]["8"]
    assert (spread.low, spread.high) == (0.25, 1.0)


def test_other_models_have_a_prefix_and_lone_servers_no_ratio() -> None:
    visits = _visits([1.0], [4.0], "demo")
    visits[Cell("llama.cpp", "demo", "int8")] = [_visit(9.0)]
    visits[Cell("vLLM", "demo", "bf16")] = [_visit(2.0)]
    figures = ratio_figures(visits)
    assert "tokens_ratio" not in figures
    assert figures["demo_tokens_ratio"] == {"bf16": {"1": 0.25, "8": 0.25}}
    assert figures["demo_vllm_tokens_ratio"] == {"bf16": {"1": 0.5, "8": 0.5}}


def test_our_vllm_engine_is_compared_with_vllms_own_experts_in_every_precision() -> None:
    visits = _visits([1.0], [1.0])
    visits[Cell("vLLM", "qwen", "bf16")] = [_visit(4.0)]
    for precision, speed in (("bf16", 3.0), ("int8", 6.0)):
        visits[Cell("FaaSMoE, engine vllm", "qwen", precision)] = [_visit(speed)]
    figures = ratio_figures(visits)
    assert figures["vllm_ratio"] == {"same": {"1": 0.75, "8": 0.75}, "int8": {"1": 1.5, "8": 1.5}}
    assert figures["spread"]["vllm_ratio"]["int8"]["8"].median == 1.5


def test_best_ratio_compares_each_server_in_its_best_precision() -> None:
    visits = _visits([1.0, 3.0, 2.0], [4.0] * 3)
    visits[Cell("llama.cpp", "qwen", "int4")] = [_visit(8.0)] * 3
    assert best_ratios(visits) == {"qwen": {"1": 0.25, "8": 0.25}}


def test_order_alternates_within_a_model_and_precision() -> None:
    cells = [Cell(s, m, "bf16") for m in ("qwen", "demo") for s in ("FaaSMoE", "llama.cpp")]
    assert visit_order(cells, 0) == cells
    assert visit_order(cells, 1) == [cells[1], cells[0], cells[3], cells[2]]


def test_agreement_of_first_tokens_and_prefixes() -> None:
    result = agreement([("a", "b", "c", "d"), ("e", "f")], [("a", "b", "x", "d"), ("x", "f")])
    assert result == {"first_tokens": 0.5, "prefix": 0.25}


def test_a_server_that_answers_something_else_is_named() -> None:
    visits = _visits([1.0], [1.0])
    assert disagreements(agreements(visits)) == []
    visits[Cell("llama.cpp", "qwen", "bf16")] = [_visit(1.0, tokens=(("x", "b"), ("y", "d")))]
    (message,) = disagreements(agreements(visits))
    assert message.startswith("qwen: llama.cpp agrees with FaaSMoE on 0% of first tokens")


def test_cpu_counts_new_processes_from_zero_and_forgets_those_that_ended() -> None:
    assert cpu_used_s({1: 5.0, 2: 1.0}, {1: 7.0, 3: 0.5}) == pytest.approx(2.5)


def test_tables_show_a_spread_only_for_several_rounds() -> None:
    once = _visits([1.0], [4.0])
    assert "0.25" in ratio_table(ratio_figures(once))
    assert ".." not in server_table(once)
    assert "1.5 (1.0..2.0)" in server_table(_visits([1.0, 2.0], [4.0, 4.0]))


def test_overview_has_idle_and_loaded_figures_memory_and_the_day() -> None:
    visits = _visits([2.0], [4.0])
    (cell, (run,)) = next(iter(visits.items()))
    visits[cell] = [replace(run, rest_pss_bytes=1 << 19)]
    day = {
        "model": {"name": "demo"},
        "servers": {"zero": [{"gb_s_per_token": 0.25}], "llama.cpp": [{"gb_s_per_token": None}]},
    }
    head, ours, theirs = overview_table(visits, day).splitlines()
    assert "TOK/S AT 1" in head
    assert "(demo)" in head
    assert ours.split() == ["qwen", "bf16", "FaaSMoE", "2.0", "16.0", "100", "1", "0", "0.250"]
    assert theirs.split() == ["qwen", "bf16", "llama.cpp", "4.0", "32.0", "50", "1"]
    assert "0.250" not in overview_table(visits, None)
