"""The evaluation of streamed completions."""

import json
from typing import Any

import pytest
from benchmarks.peers.client import StreamedResponse, StreamReader, WorkloadResult, parse_tokens


def _event(text: str, finish: str | None = None, **fields: Any) -> bytes:
    choice = {"text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **fields}).encode() + b"\n"


def test_times_are_those_of_the_first_and_the_last_token() -> None:
    reader = StreamReader(10.0)
    reader.read_line(_event("a"), 10.5)
    reader.read_line(b"\n", 10.6)
    reader.read_line(_event("b"), 11.0)
    reader.read_line(_event("c"), 11.5)
    reader.read_line(_event("", "length", usage={"completion_tokens": 3}), 12.0)
    reader.read_line(b"data: [DONE]\n", 13.0)
    response = reader.result(3)
    assert (response.ttft_s, response.last_s, response.tpot_s) == (0.5, 1.5, 0.5)


def test_usage_may_come_in_an_event_of_its_own() -> None:
    reader = StreamReader(0.0)
    reader.read_line(_event("a", "length"), 1.0)
    reader.read_line(b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n', 2.0)
    assert reader.result(1) == StreamedResponse(1.0, 1.0, 1)
    assert reader.result(1).tpot_s is None


def test_wrong_length_and_errors_are_refused() -> None:
    reader = StreamReader(0.0)
    reader.read_line(_event("a", "stop", usage={"completion_tokens": 1}), 1.0)
    with pytest.raises(RuntimeError, match="got 1 tokens, expected 24"):
        reader.result(24)
    with pytest.raises(RuntimeError, match="out of memory"):
        reader.read_line(b'data: {"error": {"message": "out of memory"}}\n', 1.0)


def test_workload_result_has_medians() -> None:
    responses = tuple(StreamedResponse(t, t + 2.3, 24) for t in (0.1, 0.2, 0.6))
    result = WorkloadResult(responses, 4.0)
    assert result.tokens_per_s == pytest.approx(18.0)
    assert result.ttft_ms == pytest.approx(200.0)
    assert result.tpot_ms == pytest.approx(100.0)


def test_tokens_of_openai_and_llama_cpp() -> None:
    assert parse_tokens({"tokens": ["a", "b"], "token_logprobs": [0, 0]}) == ("a", "b")
    assert parse_tokens({"content": [{"token": "a", "id": 1}, {"token": "b", "id": 2}]}) == (
        "a",
        "b",
    )
