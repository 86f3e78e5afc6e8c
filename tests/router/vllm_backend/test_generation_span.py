from __future__ import annotations

from dataclasses import dataclass

from recorded_span import RecordedSpan

from faasmoe_router.vllm_backend.generation_span import GenerationTrace, begin_generation
from faasmoe_tracing import NO_SPAN


@dataclass
class Params:
    n: int = 2
    max_tokens: int | None = 5
    temperature: float = 0.5
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


def test_each_choice_has_its_steps_and_the_generation_their_sums() -> None:
    span = RecordedSpan("chat tiny")
    trace = GenerationTrace(span, n_prompt=7)
    trace.begin(Params())
    trace.add(0, 1, None, n_cached=3)
    trace.add(1, 1, None, n_cached=3)
    trace.add(0, 4, "stop", n_cached=3)
    trace.add(1, 5, "length", n_cached=3)
    trace.add(1, 5, "length", n_cached=3)  # what vLLM repeats counts once
    trace.end()
    assert [child.name for child in span.children] == 2 * ["queue", "prefill", "decode"]
    generated = [c.attributes["faasmoe.generated_tokens"] for c in span.children[2::3]]
    assert generated == [4, 5]
    for child in span.children:
        assert child.start_ns is not None
        assert child.end_ns is not None
        assert child.start_ns <= child.end_ns
    assert span.attributes["gen_ai.usage.input_tokens"] == 7
    assert span.attributes["gen_ai.usage.output_tokens"] == 9
    assert span.attributes["gen_ai.response.finish_reasons"] == ["stop", "length"]


def test_the_generation_is_named_after_its_route() -> None:
    http = RecordedSpan("POST")
    body = {"stream": True}
    for path, name in (("/v1/completions", "text_completion m"), ("/v1/messages", "chat m")):
        span = begin_generation(http, path, body, model="m", tenant="acme")
        assert isinstance(span, RecordedSpan)
        assert span.name == name
        assert span.attributes["faasmoe.tenant"] == "acme"
        assert span.attributes["gen_ai.request.stream"] is True


def test_what_is_not_recorded_costs_no_span() -> None:
    assert begin_generation(NO_SPAN, "/v1/completions", {}, model="m", tenant="") is NO_SPAN
    trace = GenerationTrace(NO_SPAN, n_prompt=1)
    trace.add(0, 1, "stop", n_cached=0)
    trace.end()
