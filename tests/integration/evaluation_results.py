"""Synthetic results of `faasmoe bench` for tests."""

from collections.abc import Mapping
from typing import Any

from benchmarks.evaluation.client import RequestResult, WorkloadResult
from benchmarks.evaluation.meter import MemorySample, ResourceUsage
from benchmarks.evaluation.results import StrategyResult, to_json
from benchmarks.evaluation.run import StrategyRun

COUNTERS = {"calls": 40.0, "local": 0.0, "sent_bytes": 1000.0, "received_bytes": 1000.0}
ABOUT: Mapping[str, Any] = {
    "machine": {
        "cores": 2,
        "cpu": "some <processor>",
        "memory_bytes": 24 << 30,
        "load_1min_at_start": 0.1,
        "date": "2026-11-25",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    },
    "model": {
        "name": "demo",
        "architecture": "Qwen2MoeForCausalLM",
        "dtype": "bfloat16",
        "weights_bytes": 2_000_000_000,
        "moe_layers": 27,
        "experts": 8,
        "experts_per_function": 3,
        "functions_per_sandbox": 27,
    },
    "workload": {"name": "rounds", "digest": "abc", "tenants": 1, "requests": 2, "tokens": 20},
    "full_model": {"experts_implementation": {"alone": "eager", "shared": "grouped_mm"}},
    "seed": 0,
}


def make_result(
    number: int, *, speed: float = 1.0, text: str = "text", error: str = ""
) -> RequestResult:
    """Return a response with 10 tokens that took (1 + 9) / speed seconds."""
    if error:
        return RequestResult(0, number, error=error)
    return RequestResult(0, number, text, 10, ttft_s=1.0 / speed, total_s=10.0 / speed)


def make_run(
    *, speed: float = 1.0, cpu_s: float = 10.0, size_bytes: int = 2 * 10**9, **first: str
) -> StrategyRun:
    """Return a run with two requests; `first` has arguments of `make_result` for the first one."""
    time_s = 10.0 / speed
    usage = ResourceUsage(
        [MemorySample(0.0, size_bytes, 0), MemorySample(time_s, size_bytes, 0)], cpu_s, time_s
    )
    responses = (make_result(0, speed=speed, **first), make_result(1, speed=speed))
    return StrategyRun(WorkloadResult(responses, time_s, time_s), usage, COUNTERS)


def make_comparison(**runs: tuple[StrategyRun, ...]) -> dict[str, Any]:
    """Return the JSON figures of a comparison; `-` in strategy names is written as `_`."""
    named = {name.replace("_", "-"): StrategyResult(name, given) for name, given in runs.items()}
    return {**to_json(named, reference="full-model-shared"), "about": ABOUT}
