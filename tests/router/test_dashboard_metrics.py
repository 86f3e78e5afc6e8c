"""Every metric that the dashboards of vLLM and production-stack read is in /metrics.

`dashboard_metrics.json` has the names that the dashboards' queries use, with their source; the
dashboards themselves are not copied. Each exists from the start, before the first request, but for
those of HTTP requests. `absent` names what a dashboard reads of things that the router has not.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from faasmoe_router.api.http_metrics import HttpMetrics
from faasmoe_router.metrics import EngineMetrics, RequestRate, new_registry, render_metrics
from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes

DASHBOARDS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("dashboard_metrics.json").read_text()
)
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def rendered(metrics_accept: str = "", *, trace_id: str = "") -> str:
    registry = new_registry()
    metrics = EngineMetrics(registry, "tiny")
    metrics.observe_requests(lambda: (0, 2))
    metrics.observe_held(lambda: 4)
    metrics.observe_kv_cache(lambda: 0.5)
    metrics.observe_health(lambda: True)
    metrics.set_cache_config(n_pages=8, page_tokens=16, max_model_len=64)
    HttpMetrics(registry).record("/v1/models", "GET", 200, 0.1)
    metrics.record_request(1, 0.0)
    metrics.record_prompt(5, 3)
    if trace_id:
        metrics.record_first_token(0.3, trace_id=trace_id)
        times = SequenceTimes(arrival_s=1.0, started_s=1.5, first_token_s=2.0, last_token_s=4.0)
        metrics.record_sequence(times, SequenceCounts(5, 3, 9), max_tokens=16, trace_id=trace_id)
    body, _ = render_metrics(registry, accept=metrics_accept)
    return body.decode()


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=[d["path"] for d in DASHBOARDS])
@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_every_metric_of_a_dashboard_is_exported(dashboard: dict[str, Any], accept: str) -> None:
    text = rendered(accept)
    exported = {re.split("[{ ]", line)[0] for line in text.splitlines()}
    assert len(dashboard["metrics"]) >= 5
    assert set(dashboard["metrics"]) <= exported


def test_openmetrics_is_valid_and_keeps_vllm_s_names() -> None:
    families = {f.name for f in text_string_to_metric_families(rendered(OPENMETRICS))}
    assert {"vllm:time_to_first_token_seconds", "vllm:prompt_tokens"} <= families


def test_a_traced_request_leaves_exemplars() -> None:
    text = rendered(OPENMETRICS, trace_id=TRACE_ID)
    with_exemplar = {
        line.partition("_bucket")[0] for line in text.splitlines() if f'"{TRACE_ID}"' in line
    }
    assert with_exemplar == {
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_inference_time_seconds",
        "vllm:request_time_per_output_token_seconds",
    }
    assert TRACE_ID not in rendered(trace_id=TRACE_ID)


def test_a_request_s_times_and_tokens_are_recorded() -> None:
    found = samples(rendered(trace_id=TRACE_ID))
    label = '{model_name="tiny"}'
    expected = {
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 0.5,
        "request_decode_time_seconds_sum": 2.0,
        "request_inference_time_seconds_sum": 2.5,
        "e2e_request_latency_seconds_sum": 3.0,
        "request_time_per_output_token_seconds_sum": 0.25,
        "request_prompt_tokens_sum": 5,
        "request_generation_tokens_sum": 9,
        "request_params_max_tokens_sum": 16,
        "prefix_cache_hits_total": 3,
        "gpu_prefix_cache_queries_total": 5,
        "prompt_tokens_cached_total": 3,
    }
    assert {name: found[f"vllm:{name}{label}"] for name in expected} == expected
    assert found['vllm:healthy_pods_total{server="tiny"}'] == 1
    by_source = 'vllm:prompt_tokens_by_source_total{model_name="tiny",source="%s"}'
    assert (found[by_source % "local_compute"], found[by_source % "local_cache_hit"]) == (2, 3)
    waiting = 'vllm:num_requests_waiting_by_reason{model_name="tiny",reason="%s"}'
    assert (found[waiting % "capacity"], found[waiting % "deferred"]) == (2, 4)


def test_the_request_rate_is_of_the_last_window() -> None:
    rate = RequestRate(window_s=10)
    for second in range(20):
        rate.add(second)
    assert rate.per_second(19.5) == 1.0
    assert rate.per_second(100.0) == 0.0
