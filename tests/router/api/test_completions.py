"""The unmodified openai client against a real server."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from faasmoe_router.api import streaming
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import CompletionOutput
from faasmoe_router.engine.output_processor import SequenceOutputProcessor
from faasmoe_router.engine.request_tracker import FinishRate
from faasmoe_router.engine.tokenizer import ModelTokenizer

Until = Callable[[Callable[[], bool]], None]
Greedy = Callable[[tuple[int, ...], int], list[int]]
MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}


@pytest.fixture
def chat_text(model_tokenizer: ModelTokenizer, greedy: Greedy) -> Callable[[int], str]:
    """The greedy response to MESSAGES, computed with transformers."""

    def text(n_tokens: int) -> str:
        return model_tokenizer.decode(
            greedy(tuple(model_tokenizer.encode_chat(MESSAGES)), n_tokens)
        )

    return text


def test_chat_returns_greedy_text_and_usage(
    client: openai.OpenAI, chat_text: Callable[[int], str], model_tokenizer: ModelTokenizer
) -> None:
    answer = client.chat.completions.create(**CHAT, max_tokens=12)
    choice = answer.choices[0]
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert (choice.message.role, choice.message.content) == ("assistant", chat_text(12))
    assert choice.finish_reason == "length"
    n_prompt = len(model_tokenizer.encode_chat(MESSAGES))
    assert answer.usage is not None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, 12)
    assert usage.total_tokens == n_prompt + 12


def test_chat_stream_has_the_same_text_and_usage(
    client: openai.OpenAI, chat_text: Callable[[int], str]
) -> None:
    stream = client.chat.completions.create(
        **CHAT,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == chat_text(12)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_stream_has_openai_framing(http: httpx.Client) -> None:
    body = {**CHAT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *frames, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(frame.startswith(b"data: {") for frame in frames)
    events = [json.loads(frame.removeprefix(b"data: ")) for frame in frames]
    assert events[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    *earlier, last = [event["choices"][0] for event in events[:-1]]
    assert (last["delta"].keys(), last["finish_reason"]) == ({"content"}, "length")
    assert {choice["finish_reason"] for choice in earlier} == {None}
    assert [event["usage"] is None for event in events] == [True] * (len(events) - 1) + [False]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_stream_omits_usage_by_default(http: httpx.Client) -> None:
    body = {**CHAT, "max_tokens": 2, "stream": True}
    assert b"usage" not in http.post("/v1/chat/completions", json=body).content


def test_completion_accepts_text_and_token_ids(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    ids = model_tokenizer.encode("lazy dog")
    expected = model_tokenizer.decode(greedy(tuple(ids), 8))
    for prompt in ("lazy dog", ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert (answer.object, answer.choices[0].text) == ("text_completion", expected)
        assert answer.id.startswith("cmpl-")


def test_completion_orders_choices_by_prompt(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    prompts = ["fox", "over the"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=5, temperature=0
    )
    texts = [
        model_tokenizer.decode(greedy(tuple(model_tokenizer.encode(prompt)), 5))
        for prompt in prompts
    ]
    assert [choice.text for choice in answer.choices] == [texts[0]] * 2 + [texts[1]] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(
        len(model_tokenizer.encode(prompt)) for prompt in prompts
    )
    assert answer.usage.completion_tokens == 20


def test_completion_stream_concatenates_to_the_full_response(
    client: openai.OpenAI,
) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": ["fox", "dog"], "max_tokens": 9, "seed": 1}
    full_response = client.completions.create(**body)
    texts = ["", ""]
    for chunk in client.completions.create(**body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in full_response.choices]


def test_seed_is_reproducible_and_choices_differ(client: openai.OpenAI) -> None:
    def sample(**params: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=16, n=2, **params
        )
        return [choice.message.content for choice in answer.choices]

    first = sample(seed=5, temperature=1.2, top_p=0.9)
    assert sample(seed=5, temperature=1.2, top_p=0.9) == first
    assert first[0] != first[1]
    assert sample(temperature=1.2) != sample(temperature=1.2)


def test_top_k_of_one_is_greedy(client: openai.OpenAI, chat_text: Callable[[int], str]) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=10, temperature=2, extra_body={"top_k": 1}
    )
    assert answer.choices[0].message.content == chat_text(10)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_excluded_from_text(
    http: httpx.Client, chat_text: Callable[[int], str], stream: bool
) -> None:
    text = chat_text(30)
    stop = text[10:13]
    body = {**CHAT, "max_tokens": 30, "stop": [stop, "never"], "stream": stream}
    response = http.post("/v1/chat/completions", json=body)
    assert _text_and_finish_reason(response) == (text[: text.index(stop)], "stop")


def _text_and_finish_reason(response: httpx.Response) -> tuple[str, str]:
    if not response.headers["content-type"].startswith("text/event-stream"):
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    events = [json.loads(line[6:]) for line in response.text.splitlines() if "{" in line]
    choices = [event["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, choices[-1]["finish_reason"]


def test_generation_without_limit_fills_the_context(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer
) -> None:
    answer = client.chat.completions.create(**CHAT)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_completion_without_limit_has_16_tokens(client: openai.OpenAI) -> None:
    [usage] = [client.completions.create(model="tiny", prompt="fox").usage]
    assert usage is not None
    assert usage.completion_tokens == 16
    prompts: Any = ["fox", [5] * 250]
    both = client.completions.create(model="tiny", prompt=prompts)
    assert both.usage is not None
    assert both.usage.completion_tokens == 16 + 6  # what the context of 256 leaves


def test_content_may_be_text_parts(client: openai.OpenAI, chat_text: Callable[[int], str]) -> None:
    parts = [{"type": "text", "text": "the quick "}, {"type": "text", "text": "brown fox"}]
    messages: Any = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, temperature=0
    )
    assert answer.choices[0].message.content == chat_text(6)


def test_unknown_and_neutral_parameters_are_ignored(
    client: openai.OpenAI, chat_text: Callable[[int], str]
) -> None:
    answer = client.chat.completions.create(
        **CHAT,
        max_tokens=4,
        user="me",
        metadata={"a": "b"},
        logprobs=False,
        presence_penalty=0,
        tools=[],
        response_format={"type": "text"},
        extra_body={"some_future_parameter": {"x": 1}},
    )
    assert answer.choices[0].message.content == chat_text(4)


@pytest.mark.parametrize("stream", [False, True])
def test_client_disconnect_aborts_the_request(
    http: httpx.Client, engine: Engine, until: Until, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    _never_finish(monkeypatch)
    body = {**CHAT, "stream": stream}
    aborted = _finished_requests(http, "abort")
    if stream:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            chunks = response.iter_bytes()  # kept alive: the connection closes with its iterator
            next(chunks)
            assert engine.is_busy
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=1.0)
    until(lambda: not engine.is_busy and _n_unfinished_requests(http) == 0)
    until(lambda: _finished_requests(http, "abort") > aborted)
    monkeypatch.undo()
    assert _finished_requests(http, "abort") == aborted + 1


def _never_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide finish reasons, so that sequences run on until the client disconnects."""
    process_tokens = SequenceOutputProcessor.process_tokens

    def endless(self: Any, tokens: list[int]) -> Any:
        output = process_tokens(self, tokens)
        return CompletionOutput(output.text, output.n_tokens)

    monkeypatch.setattr(SequenceOutputProcessor, "process_tokens", endless)


def _n_unfinished_requests(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    values = [float(line.split()[-1]) for line in lines if line.startswith(names)]
    assert len(values) == 2
    return sum(values)


def _finished_requests(http: httpx.Client, reason: str) -> float:
    name = f'vllm:request_success_total{{finished_reason="{reason}",model_name="tiny"}} '
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_stream_failure_is_sent_as_last_event(
    http: httpx.Client, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("an internal detail")

    monkeypatch.setattr(SequenceOutputProcessor, "process_tokens", broken)
    response = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    *_, last, rest = response.content.split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["type"] == "server_error"
    assert rest == b""
    assert b"DONE" not in response.content
    assert b"internal detail" not in response.content
    with pytest.raises(openai.APIError, match="could not finish"):
        list(client.chat.completions.create(**CHAT, stream=True))


def test_failure_without_streaming_is_a_500(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("an internal detail")

    monkeypatch.setattr(SequenceOutputProcessor, "process_tokens", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(**CHAT)
    assert "internal detail" not in str(failed.value)


def test_a_stream_that_waits_in_the_queue_sends_comments(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_finish(monkeypatch)
    monkeypatch.setattr(streaming, "KEEPALIVE_S", 0.05)
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "n": 4, "stream": True}) as all:
        assert all.status_code == 200  # holds every slot
        with http.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
            assert next(response.iter_lines()) == ": waiting"


def test_full_queue_returns_429(
    client: openai.OpenAI, server: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_finish(monkeypatch)
    monkeypatch.setattr(server[1]._tracker, "_finish_rate", FinishRate())  # nothing ended yet
    with (
        client.chat.completions.create(**CHAT, n=10, stream=True),
        pytest.raises(openai.RateLimitError) as rejected,
    ):
        client.chat.completions.create(**CHAT, n=3, max_tokens=2)
    assert rejected.value.code == "rate_limit_exceeded"
    assert rejected.value.response.headers["retry-after"] == "1"
