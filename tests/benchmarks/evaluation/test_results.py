import json

import evaluation_results as figures
import pytest
from benchmarks.evaluation.results import StrategyResult, ratios, to_json


def test_figures_of_a_run() -> None:
    values = figures.make_run(cpu_s=5.0).figures()
    assert values["tokens_per_s"] == pytest.approx(20 / 10)
    assert values["ttft_p50_s"] == values["ttft_p99_s"] == 1.0
    assert values["tpot_p50_s"] == pytest.approx(1.0)
    assert values["cpu_s_per_token"] == pytest.approx(0.25)
    assert values["cpu_percent"] == pytest.approx(50)
    assert values["gb_s"] == pytest.approx(20)
    assert values["gb_s_per_token"] == pytest.approx(1.0)
    assert (values["peak_gb"], values["mean_gb"]) == (2.0, 2.0)
    assert values["calls_per_token"] == pytest.approx(2.0)
    assert values["wire_bytes_per_token"] == pytest.approx(100)
    assert values["cold_start_p50_s"] is None
    assert (values["requests"], values["failures"]) == (2, 0)


def test_failed_requests_have_no_latency_and_no_tokens() -> None:
    run = figures.make_run(error="status 429")
    assert (run.figures()["failures"], run.figures()["tokens"]) == (1, 10)
    assert len(run.ttfts_s) == 1
    assert run.details()["errors"] == ["status 429"]


def test_figures_are_medians_and_failures_are_summed() -> None:
    runs = tuple(figures.make_run(speed=s) for s in (1.0, 2.0, 4.0))
    found = to_json(
        {"x": StrategyResult("X", (*runs, figures.make_run(error="gone")))}, reference="none"
    )
    assert found["x"]["tokens_per_s"] == pytest.approx((2 + 4) / 2)  # 1, 2, 4 and 8 tokens/s
    assert found["x"]["failures"] == 1
    assert found["x"]["spread"]["tokens_per_s"] == pytest.approx([1.0, 8.0])
    assert found["x"]["equal_texts"] is None
    assert json.loads(json.dumps(found)) == found


def test_texts_are_compared_with_reference_strategy() -> None:
    found = figures.make_comparison(
        full_model_shared=(figures.make_run(), figures.make_run()),
        functions_shared=(figures.make_run(), figures.make_run(text="teXt")),
    )
    assert found["full-model-shared"]["equal_texts"] == 1.0
    assert found["functions-shared"]["equal_texts"] == pytest.approx(0.75)
    assert found["functions-shared"]["equal_characters"] == pytest.approx(1 - 1 / 8)


def test_ratios_compare_runs_of_the_same_repetition() -> None:
    # The machine is twice as fast in the second repetition; the ratio is the same in both.
    found = figures.make_comparison(
        full_model_shared=(figures.make_run(speed=1.0), figures.make_run(speed=2.0)),
        functions_shared=(figures.make_run(speed=0.5), figures.make_run(speed=1.0)),
    )
    found.pop("about")
    assert ratios(found, baseline="full-model-shared")["functions-shared"] == pytest.approx(
        {
            "tokens_per_s": 0.5,
            "ttft_p50_s": 2.0,
            "tpot_p50_s": 2.0,
            "cpu_s_per_token": 1.0,
            "gb_s_per_token": 2.0,
        }
    )
