"""Traces of `faasmoe up`, as a collector gets them: one tree over all processes, and links."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from core_waits import Stopwatch
from engines import RouterEngine
from faasmoe_up import FaasmoeUp, running_up, wait_until
from moemodel_files import write_moemodel
from otlp_collector import CollectedSpan, OtlpCollector, running_collector

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
GATEWAY, ROUTER, CONTROL = "faasmoe-gateway", "faasmoe-router", "faasmoe-control"
BODY = {
    "model": "tiny",
    "max_tokens": 6,
    "temperature": 0,
    "messages": [{"role": "user", "content": "the quick brown fox"}],
}
SCALING = {  # to zero within seconds
    "windowSeconds": 6,
    "panicWindowPercentage": 20,
    "scaleToZeroGracePeriodSeconds": 0,
}
SLACK_S = 0.1  # processes read one clock, but may be suspended between two readings


@pytest.fixture(scope="module")
def collector(engine: RouterEngine) -> Iterator[OtlpCollector]:
    """A collector of each engine's own."""
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def up(
    engine: RouterEngine, collector: OtlpCollector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("traced")
    model = engine.save_model(folder / "model")
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(folder / "store")},
        "granularity": {"expertsPerFunction": 2},
        "router": engine.router_spec(maxNumSeqs=4),
        "experts": {"device": "cpu", "functionsPerSandbox": 8, "scaling": SCALING},
    }
    file = write_moemodel(folder / "tiny.yaml", spec)
    options = ("--otlp-endpoint", collector.url, "--trace-ratio", "0")
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "100", **engine.variables}
    with running_up(
        file,
        folder / "up.log",
        *options,
        variables=variables,
        timeout_s=engine.start_timeout_s,
    ) as up:
        yield up


def chat(
    up: FaasmoeUp, *, trace_id: str = TRACE_ID, flags: str = "01", **body: Any
) -> httpx.Response:
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-{flags}"}
    return httpx.post(
        f"{up.base_url}/v1/chat/completions",
        json={**BODY, **body},
        headers=headers,
        timeout=120,
        trust_env=False,
    )


def wait_for_zero(up: FaasmoeUp) -> None:
    def is_at_zero() -> bool:
        return not any(f["ready"] or f["desired"] for f in up.status()["functions"])

    wait_until(is_at_zero, timeout_s=240, what="no function is active")


def of_trace(spans: list[CollectedSpan], trace_id: str) -> CollectedSpan:
    (span,) = [s for s in spans if s.trace_id == trace_id]
    return span


def test_cold_chat_is_one_tree_whose_times_add_up(
    engine: RouterEngine, up: FaasmoeUp, collector: OtlpCollector
) -> None:
    wait_for_zero(up)
    assert up.router is not None
    stopwatch = Stopwatch(up.router.pid)
    response = chat(up)
    assert response.status_code == 200, response.text
    assert float(response.headers["X-FaaSMoE-Cold-Start"]) > 0
    gateway = of_trace(collector.wait_for(GATEWAY, "POST /v1/chat/completions"), TRACE_ID)
    router = of_trace(collector.wait_for(ROUTER, "POST /v1/chat/completions"), TRACE_ID)
    activation = of_trace(collector.wait_for(CONTROL, "activation"), TRACE_ID)
    print("\n".join(collector.tree(gateway)))
    slack_s = SLACK_S + stopwatch.waited_s()  # the router may read the end later than others

    assert gateway.parent_id == PARENT_ID
    assert router.parent_id == gateway.span_id
    chat_span = of_trace(collector.wait_for(ROUTER, "chat tiny"), TRACE_ID)
    assert chat_span.parent_id == router.span_id
    names = [span.name for span in collector.children(chat_span)]
    assert names == ["hold", "queue", "prefill", "decode"]
    hold, *computing = collector.children(chat_span)
    (request,) = collector.children(hold)
    assert (request.name, activation.parent_id) == ("activate", request.span_id)
    steps = collector.children(activation)
    assert [span.name for span in steps] == ["wake", "place", "attach"]

    for parent in (gateway, router, chat_span, hold, request, activation):
        for child in collector.children(parent):
            assert child.start_ns >= parent.start_ns - SLACK_S * 1e9, (parent.name, child.name)
            assert child.end_ns <= parent.end_ns + slack_s * 1e9, (parent.name, child.name)
    assert sum(s.seconds for s in steps) == pytest.approx(activation.seconds, abs=1e-3)
    held_s = float(response.headers["X-FaaSMoE-Cold-Start"])
    assert hold.seconds >= held_s - SLACK_S
    assert hold.seconds + sum(s.seconds for s in computing) <= chat_span.seconds + SLACK_S
    assert computing[2].attributes["faasmoe.generated_tokens"] == 6
    attach = steps[2]
    assert attach.attributes["faasmoe.functions"] == len(up.status()["functions"])
    assert {s.name for s in collector.children(router)} >= engine.handlers


def test_generation_has_the_attributes_of_the_conventions(
    up: FaasmoeUp, collector: OtlpCollector
) -> None:
    trace_id = "a" * 32
    response = chat(up, trace_id=trace_id, max_tokens=3, stream=True, temperature=0.5)
    assert "data: [DONE]" in response.text
    wait_until(
        lambda: any(s.trace_id == trace_id for s in collector.named(ROUTER, "chat")),
        timeout_s=60,
        what="the generation's span",
    )
    span = of_trace(collector.named(ROUTER, "chat"), trace_id)
    n_prompt = span.attributes["gen_ai.usage.input_tokens"]
    assert span.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "faasmoe",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.output.type": "text",
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": n_prompt,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert n_prompt > 4


def test_requests_that_wait_together_link_to_one_activation(
    up: FaasmoeUp, collector: OtlpCollector
) -> None:
    wait_for_zero(up)
    trace_ids = [f"{index + 1:032x}" for index in range(3)]
    with ThreadPoolExecutor(len(trace_ids)) as threads:
        responses = list(threads.map(lambda t: chat(up, trace_id=t, max_tokens=2), trace_ids))
    assert [r.status_code for r in responses] == [200] * len(trace_ids)
    wait_until(
        lambda: {s.trace_id for s in collector.named(ROUTER, "chat")} >= {*trace_ids},
        timeout_s=60,
        what="all generations' spans",
    )
    holds = [s for s in collector.named(ROUTER, "hold") if s.trace_id in trace_ids]
    requests = [s for s in collector.named(ROUTER, "activate") if s.trace_id in trace_ids]
    (request,) = requests  # one activation, however many requests wait
    for hold in holds:
        linked = hold.links == ((request.trace_id, request.span_id),)
        assert linked or request.parent_id == hold.span_id
    (activation,) = [
        s for s in collector.wait_for(CONTROL, "activation") if s.trace_id in trace_ids
    ]
    assert activation.parent_id == request.span_id


def test_what_the_client_does_not_sample_is_not_traced(
    up: FaasmoeUp, collector: OtlpCollector
) -> None:
    unsampled, after = "b" * 32, "c" * 32
    assert chat(up, trace_id=unsampled, flags="00").status_code == 200
    without = httpx.post(
        f"{up.base_url}/v1/chat/completions", json=BODY, timeout=60, trust_env=False
    )
    assert without.status_code == 200  # --trace-ratio 0
    known = {s.trace_id for s in collector.spans} | {after}
    assert chat(up, trace_id=after).status_code == 200
    wait_until(
        lambda: any(s.trace_id == after for s in collector.named(GATEWAY, "POST")),
        timeout_s=60,
        what="the span of the request after them",
    )
    assert {s.trace_id for s in collector.spans} == known
    assert unsampled not in known


def test_a_collector_that_fails_keeps_nobody_from_being_served(
    up: FaasmoeUp, collector: OtlpCollector
) -> None:
    collector.status = 503
    try:
        assert [chat(up, trace_id="d" * 32).status_code for _ in range(5)] == [200] * 5
    finally:
        collector.status = 200


def test_exemplars_name_the_trace(engine: RouterEngine, up: FaasmoeUp) -> None:
    if not engine.has_exemplars:
        pytest.skip("the engine's histograms are vLLM's")
    trace_id = "e" * 32
    assert chat(up, trace_id=trace_id).status_code == 200
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(f"{up.base_url}/metrics", headers=headers, trust_env=False, timeout=60).text
    assert "vllm:time_to_first_token_seconds_bucket" in text
    assert f'# {{trace_id="{trace_id}"}}' in text
    plain = httpx.get(f"{up.base_url}/metrics", trust_env=False, timeout=60).text
    assert trace_id not in plain


def test_spans_of_texts_of_equal_length_differ_in_their_times_alone(
    up: FaasmoeUp, collector: OtlpCollector
) -> None:
    """An attacker who reads all traces knows of a text what its lengths tell, and times."""
    trace_ids = [f"{index + 1:032x}" for index in range(16, 20)]
    for index, trace_id in enumerate(trace_ids):
        prompt = [20 + 7 * index + offset for offset in range(12)]
        headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        response = httpx.post(
            f"{up.base_url}/v1/completions",
            json=body,
            headers=headers,
            timeout=120,
            trust_env=False,
        )
        assert response.status_code == 200, response.text

    def of(trace_id: str) -> list[CollectedSpan]:
        return [s for s in collector.spans if s.trace_id == trace_id]

    wait_until(
        lambda: all(
            any(s.service == GATEWAY for s in of(t) if s.parent_id == PARENT_ID)
            and any(s.name.startswith("text_completion") for s in of(t))
            for t in trace_ids
        ),
        timeout_s=60,
        what="all traces",
    )
    waits = {"hold", "activate", "activation tiny", "wake", "place", "attach"}  # the first's alone
    shown = [
        sorted(
            (s.service, s.name, sorted(s.attributes.items())) for s in of(t) if s.name not in waits
        )
        for t in trace_ids
    ]
    assert len(shown[0]) >= 6
    assert all(spans == shown[0] for spans in shown)
