"""What `faasmoe explain` makes of a status and of metrics."""

from typing import Any

import pytest

from faasmoe_operator.cli.diagnosis import (
    CHANGES,
    parse_totals,
    render,
    step_times,
    why_not_ready,
    why_slow,
)


def function(*, ready: int = 1, desired: int = 1) -> dict[str, Any]:
    return {"ready": ready, "desired": desired, "size_bytes": 500_000_000}


def status(**changes: Any) -> dict[str, Any]:
    return {
        "functions": [function(), function()],
        "followers": 1,
        "held": 0,
        "failure": "",
        **changes,
    }


def totals(**seconds: float) -> dict[str, float]:
    sums = {f"vllm:request_{step}_time_seconds_sum": s for step, s in seconds.items()}
    held = sums.pop("vllm:request_activation_time_seconds_sum", 0.0)
    return {
        "vllm:e2e_request_latency_seconds_count": 10.0,
        "faasmoe_router_cold_start_seconds_sum": held,
        **sums,
    }


@pytest.mark.parametrize(
    ("changes", "step", "what"),
    [
        ({"failure": "sandbox x failed: disk full"}, "sandboxes", "disk full"),
        ({"followers": 0}, "router", "no router follows"),
        (
            {"functions": [function(ready=0), function()]},
            "activation",
            "1 of 2 functions are being attached, 0.5 GB",
        ),
        ({"held": 3}, "activation", "3 requests wait"),
    ],
)
def test_what_keeps_a_model_from_being_ready(changes: dict[str, Any], step: str, what: str) -> None:
    (finding,) = why_not_ready(status(**changes))
    assert finding.step == step
    assert what in finding.what
    assert finding.change


def test_a_ready_model_has_no_finding() -> None:
    assert why_not_ready(status(functions=[function(ready=0, desired=0)])) == []


@pytest.mark.parametrize("step", list(CHANGES))
def test_the_step_that_takes_the_time_is_named_with_what_to_change(step: str) -> None:
    findings = why_slow(totals(**{**dict.fromkeys(CHANGES, 1.0), step: 50.0}))
    assert [f.step for f in findings] == [step]
    assert findings[0].change == CHANGES[step]
    assert "5.00 s of a request on average, 94 % of its time" in findings[0].what


def test_shares_are_of_all_steps() -> None:
    times = step_times(totals(activation=1.0, queue=1.0, prefill=2.0, decode=4.0))
    assert [t.share for t in times] == [0.125, 0.125, 0.25, 0.5]
    assert step_times({}) == []


@pytest.mark.parametrize(
    ("found", "step", "what"),
    [
        ({"faasmoe_router_function_call_failures_total": 5.0}, "functions", "5.0 % of calls"),
        ({"faasmoe_router_local_computations_total": 5.0}, "functions", "5 calls were computed"),
        ({"vllm:kv_cache_usage_perc": 0.95}, "KV cache", "95 % is taken"),
        ({"vllm:num_preemptions_total": 7.0}, "queue", "7 times"),
    ],
)
def test_what_is_unusual_is_said(found: dict[str, float], step: str, what: str) -> None:
    (finding,) = why_slow({"faasmoe_router_function_calls_total": 100.0, **found})
    assert finding.step == step
    assert what in finding.what


def test_samples_are_summed_over_their_labels() -> None:
    text = '# HELP a b\n# TYPE a counter\na_total{x="1"} 2.0\na_total{x="2"} 3.0\nb 1e+3\n'
    assert parse_totals(text) == {"a_total": 5.0, "b": 1000.0}


def test_everything_is_rendered() -> None:
    metrics = {
        **totals(activation=0.0, queue=0.0, prefill=1.0, decode=19.0),
        "vllm:time_to_first_token_seconds_sum": 5.0,
        "vllm:time_to_first_token_seconds_count": 10.0,
        "vllm:request_time_per_output_token_seconds_sum": 0.2,
        "vllm:request_time_per_output_token_seconds_count": 10.0,
    }
    text = render("tiny", status(), metrics)
    assert "tiny: ready; 2 of 2 functions are active" in text
    assert "10 requests; first token 0.50 s, then 20.0 ms a token" in text
    assert "decode: 1.90 s of a request on average, 95 % of its time" in text
    assert "Times are unknown: why" in render("tiny", status(), None, note="why")
    assert "No request has been answered" in render("tiny", status(), {})
    assert "tiny: not ready" in render("tiny", status(followers=0), {})
