"""The comparison of a bursty day."""

from typing import Any

from benchmarks.evaluation.client import RequestResult, WorkloadResult
from benchmarks.evaluation.day import (
    DURATION_S,
    LLAMA,
    OURS,
    RESIDENT,
    DayRun,
    compare,
    describe_day,
    format_day,
    markdown,
    window_minutes,
)
from benchmarks.evaluation.meter import MemorySample, ResourceUsage


def _figures(gb: float, *results: RequestResult) -> dict[str, Any]:
    samples = [MemorySample(t, int(gb * 1e9), 0) for t in (0.0, 10.0)]
    usage = ResourceUsage(samples, cpu_s=1.0, time_s=10.0)
    return DayRun(WorkloadResult(results, 10.0, 10.0), usage).figures()


def _served(n_tokens: int = 5) -> RequestResult:
    return RequestResult(0, 0, text="a", n_tokens=n_tokens, ttft_s=0.5, total_s=1.0)


FAILED = RequestResult(0, 1, error="status 503")


def test_gb_seconds_are_divided_by_generated_tokens() -> None:
    figures = _figures(2.0, _served(5), _served(5), FAILED)
    assert figures["gb_s_per_token"] == 2.0 * 10 / 10
    assert (figures["tokens"], figures["failed"], figures["errors"]) == (10, 1, ["status 503"])
    assert figures["mean_gb"] == figures["min_gb"] == figures["max_gb"] == 2.0


def test_time_at_rest_is_that_near_the_least_memory() -> None:
    memory = ((0.0, 1.0), (4.0, 1.05), (5.0, 3.0), (7.0, 3.0), (8.0, 1.0), (10.0, 1.0))
    usage = ResourceUsage([MemorySample(t, int(gb * 1e9), 0) for t, gb in memory], time_s=10.0)
    figures = DayRun(WorkloadResult((_served(),), 10.0, 10.0), usage).figures()
    assert figures["at_rest"] == 0.6
    assert figures["longest_gap_s"] == 4.0


def test_ordinary_day_is_long_enough_for_windows_that_somebody_would_configure() -> None:
    assert window_minutes(DURATION_S) == {"functions": 14.4, "router": 24.0}
    assert window_minutes(165.0) == {"functions": 52.4, "router": 87.3}


def test_page_tells_windows_and_ratios_of_one_run() -> None:
    figures = compare({OURS: [_figures(1.0, _served())], RESIDENT: [_figures(4.0, _served())]})
    workload = {"duration_s": 600.0, "requests": 60, "window_minutes": window_minutes(600.0)}
    model = {"name": "qwen", "quantization": "int4"}
    machine = {"cores": 2, "cpu": "a", "date": "b"}
    about = {"workload": workload, "model": model, "machine": machine}
    page = markdown(figures, about)
    assert describe_day(workload) in page
    assert "14.4 minutes of the day" in page
    assert "24 minutes" in page
    assert "Model qwen, int4; 2 cores of a, b." in page
    assert "- `gb_s_per_token_over_resident`: 0.250" in page
    assert "- `gb_s_per_token_over_llama_cpp`: –" in page


def test_ratios_are_of_medians() -> None:
    runs = {
        OURS: [_figures(gb, _served()) for gb in (1.0, 1.0, 5.0)],
        RESIDENT: [_figures(gb, _served()) for gb in (4.0, 4.0, 4.0)],
        LLAMA: [_figures(gb, _served()) for gb in (2.0, 2.0, 2.0)],
    }
    figures = compare(runs)
    assert figures["gb_s_per_token_over_resident"] == 0.25
    assert figures["gb_s_per_token_over_llama_cpp"] == 0.5
    assert figures["failed"] == 0
    assert "gb_s_per_token_over_resident: 0.250" in format_day(figures)


def test_a_server_that_did_not_run_or_answer_has_no_ratio() -> None:
    figures = compare({OURS: [_figures(1.0, _served())], RESIDENT: [_figures(1.0, FAILED)]})
    assert figures["gb_s_per_token_over_resident"] is None
    assert figures["gb_s_per_token_over_llama_cpp"] is None
    assert "gb_s_per_token_over_llama_cpp: –" in format_day(figures)
