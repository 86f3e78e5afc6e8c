"""Every endpoint and parameter, by the unmodified openai client; and the document that says so.

Each case is a row of docs/openai.md and the test that holds it. To write the document again:

    python -m tests.router.api.test_conformance
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from faasmoe_router.api import validation
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer

DOCUMENT = Path(__file__).parents[3] / "docs" / "openai.md"
MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": None}}


@dataclass(frozen=True)
class ApiUnderTest:
    """A server, and who asks it."""

    client: openai.OpenAI
    tools: openai.OpenAI
    http: httpx.Client
    codec: ModelTokenizer

    def chat(self, **parameters: Any) -> Any:
        """Ask for a chat completion: greedy, of few tokens, unless told otherwise."""
        return _chat(self.client, **parameters)

    def text(self, **parameters: Any) -> Any:
        """Ask for a completion: greedy, of few tokens, unless told otherwise."""
        asked = {"prompt": "the quick", "temperature": 0, "max_tokens": 12, **_extra(parameters)}
        return self.client.completions.create(model="tiny", **asked)

    def tokens(self, text: str) -> list[int]:
        """Return a text's tokens."""
        return self.codec.encode(text, add_special_tokens=False)


# What the client's own methods take; the rest goes into the body beside it.
OPENAI = {
    *signature(Completions.create).parameters,
    *signature(ChatCompletions.create).parameters,
}


def _extra(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the client's arguments: what it does not know goes into the body beside them."""
    known = {name: value for name, value in parameters.items() if name in OPENAI}
    unknown = {name: value for name, value in parameters.items() if name not in OPENAI}
    return {**known, "extra_body": unknown}


def _chat(client: openai.OpenAI, **parameters: Any) -> Any:
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **_extra(parameters)}
    return client.chat.completions.create(model="tiny", **asked)


def _message_content(answer: Any) -> str:
    return str(answer.choices[0].message.content)


@dataclass(frozen=True)
class ConformanceCase:
    """A row of the document, and what holds it."""

    section: str
    name: str
    description: str
    check: Callable[[ApiUnderTest], None]


CASES: list[ConformanceCase] = []


def conformance_case(
    section: str, name: str, says: str
) -> Callable[[Callable[[ApiUnderTest], None]], None]:
    """Add a case: `says` is what the document tells of it."""

    def add(check: Callable[[ApiUnderTest], None]) -> None:
        CASES.append(ConformanceCase(section, name, says, check))

    return add


@pytest.fixture(scope="module")
def peer(
    server: tuple[str, Engine], tool_server: str, codec: ModelTokenizer
) -> Iterator[ApiUnderTest]:
    asked: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20}
    with (
        openai.OpenAI(base_url=f"{server[0]}/v1", **asked) as client,
        openai.OpenAI(base_url=f"{tool_server}/v1", **asked) as tools,
        httpx.Client(base_url=server[0], timeout=20) as http,
    ):
        yield ApiUnderTest(client, tools, http, codec)


ENDPOINTS, BOTH, CHAT, TEXT = "Endpoints", "Both", "Chat completions", "Completions"
ANSWERS = "Answers"


@conformance_case(
    ENDPOINTS, "POST /v1/chat/completions", "whole, or as a stream of server-sent events"
)
def _chat_endpoint(peer: ApiUnderTest) -> None:
    whole = peer.chat()
    chunks = list(peer.chat(stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == _message_content(whole)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


@conformance_case(ENDPOINTS, "POST /v1/completions", "the same, for text or tokens, one or several")
def _completion_endpoint(peer: ApiUnderTest) -> None:
    whole = peer.text(prompt=["a", "b"])
    texts = ["", ""]
    for chunk in peer.text(prompt=["a", "b"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@conformance_case(ENDPOINTS, "GET /v1/models, /v1/models/{id}", "the model, with `max_model_len`")
def _models(peer: ApiUnderTest) -> None:
    [model] = peer.client.models.list().data
    assert peer.client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        peer.client.models.retrieve("other")


@conformance_case(
    ENDPOINTS, "POST /v1/embeddings", "501 with an error object: the model makes none"
)
def _embeddings(peer: ApiUnderTest) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        peer.client.with_options(max_retries=2).embeddings.create(model="tiny", input="a")
    assert refused.value.status_code == 501
    assert refused.value.code == "not_implemented"
    assert refused.value.response.headers["x-should-retry"] == "false"


@conformance_case(ENDPOINTS, "POST /v1/responses", "501 with an error object")
def _responses(peer: ApiUnderTest) -> None:
    with pytest.raises(openai.InternalServerError, match="chat/completions") as refused:
        peer.client.responses.create(model="tiny", input="a")
    assert refused.value.status_code == 501


@conformance_case(
    ENDPOINTS, "POST /tokenize, /v1/tokenize", "vLLM's bodies: a prompt or messages, with tools"
)
def _tokenize(peer: ApiUnderTest) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        found = peer.http.post(path, json={"prompt": "fox", "return_token_strs": True}).json()
        ids = peer.tokens("fox")
        assert found == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": peer.codec.token_strings(ids),
        }
        chat = {"messages": MESSAGES, "add_generation_prompt": True}
        assert peer.http.post(path, json=chat).json()["tokens"] == peer.codec.encode_chat(MESSAGES)


@conformance_case(ENDPOINTS, "POST /detokenize, /v1/detokenize", "vLLM's bodies")
def _detokenize(peer: ApiUnderTest) -> None:
    body = {"tokens": [0, *peer.tokens("fox 日")]}
    long = {"tokens": peer.tokens("x") * 5000}
    assert peer.http.post("/detokenize", json=long).json() == {"prompt": "x" * 5000}
    for path in ("/detokenize", "/v1/detokenize"):
        assert peer.http.post(path, json=body).json() == {"prompt": "<|end|>fox 日"}


@conformance_case(
    ENDPOINTS, "GET /health, /version, /metrics", "for probes and Prometheus, not for the public"
)
def _probes(peer: ApiUnderTest) -> None:
    assert [peer.http.get(path).status_code for path in ("/health", "/version", "/metrics")] == (
        [200] * 3
    )


@conformance_case(BOTH, "model", "the served name; another is 404 `model_not_found`")
def _model(peer: ApiUnderTest) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        peer.client.completions.create(model="other", prompt="a")
    assert refused.value.code == "model_not_found"


@conformance_case(
    BOTH, "max_tokens", "finish reason `length`; too many for the context are refused"
)
def _max_tokens(peer: ApiUnderTest) -> None:
    assert peer.text(max_tokens=5).usage.completion_tokens == 5
    with pytest.raises(openai.BadRequestError) as refused:
        peer.text(max_tokens=10**6)
    assert refused.value.code == "context_length_exceeded"


@conformance_case(
    BOTH, "temperature, top_p, top_k, min_p", "0 to 2; 0 is greedy; without temperature, 1"
)
def _sampling(peer: ApiUnderTest) -> None:
    greedy = _message_content(peer.chat())
    for narrow in ({"top_p": 0}, {"top_k": 1}, {"min_p": 1}):
        assert _message_content(peer.chat(temperature=2, seed=4, **narrow)) == greedy
    assert _message_content(peer.chat(temperature=2, seed=4)) != greedy


@conformance_case(BOTH, "seed", "repeats, alone and among others; choices get seeds of their own")
def _seed(peer: ApiUnderTest) -> None:
    def sample(**asked: Any) -> list[str]:
        answer = peer.chat(temperature=1.5, seed=11, **asked)
        return [choice.message.content for choice in answer.choices]

    alone = sample()
    among = sample(n=4)
    assert sample() == alone == among[:1]
    assert len(set(among)) == 4
    with peer.chat(stream=True, max_tokens=200, seed=1, temperature=1):
        assert sample() == alone


@conformance_case(BOTH, "n", "up to 128 choices, as far as the server holds so many")
def _n(peer: ApiUnderTest) -> None:
    answer = peer.text(n=3, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 36


@conformance_case(BOTH, "stop", "up to 4 strings; what ends the text is not in it")
def _stop(peer: ApiUnderTest) -> None:
    text = peer.text(max_tokens=40).choices[0].text
    choice = peer.text(max_tokens=40, stop=["never", text[8:11]]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[8:11])], "stop")


@conformance_case(
    BOTH, "include_stop_str_in_output", "the stop string, or the stop token's text, is in the text"
)
def _include_stop(peer: ApiUnderTest) -> None:
    text = peer.text(max_tokens=40).choices[0].text
    stop = text[8:11]
    found = peer.text(max_tokens=40, stop=stop, include_stop_str_in_output=True).choices[0]
    assert (found.text, found.finish_reason) == (text[: text.index(stop) + 3], "stop")


@conformance_case(BOTH, "stop_token_ids", "end the text, as the model's own end tokens do")
def _stop_token_ids(peer: ApiUnderTest) -> None:
    letters = {"allowed_token_ids": peer.tokens("abcdefgh")}
    text = peer.text(**letters).choices[0].text
    [stop] = peer.tokens(text[3])
    choice = peer.text(stop_token_ids=[stop], **letters).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[3])], "stop")


@conformance_case(BOTH, "min_tokens", "no end token and no stop string counts before")
def _min_tokens(peer: ApiUnderTest) -> None:
    forced = {"structured_outputs": {"regex": "[ab]{1,30}"}, "logit_bias": {"0": 100}}
    assert peer.text(max_tokens=40, **forced).usage.completion_tokens == 2  # a letter, the end
    assert peer.text(max_tokens=40, min_tokens=9, **forced).usage.completion_tokens == 10


@conformance_case(BOTH, "ignore_eos", "goes on after the model's end token")
def _ignore_eos(peer: ApiUnderTest) -> None:
    assert peer.text(ignore_eos=True).choices[0].finish_reason == "length"


@conformance_case(BOTH, "skip_special_tokens", "false tells special tokens as text")
def _skip_special(peer: ApiUnderTest) -> None:
    only = {"allowed_token_ids": [1], "max_tokens": 2}
    assert peer.text(**only).choices[0].text == ""
    assert peer.text(skip_special_tokens=False, **only).choices[0].text == "<|im_start|>" * 2


@conformance_case(BOTH, "presence_penalty, frequency_penalty", "-2 to 2, over the output")
def _penalties(peer: ApiUnderTest) -> None:
    [x, y] = peer.tokens("xy")
    two = {"allowed_token_ids": [x, y], "max_tokens": 6, "logit_bias": {str(x): 20, str(y): 19}}
    assert "y" in peer.text(**{**two, "frequency_penalty": 2}).choices[0].text
    likely = {**two, "logit_bias": {str(x): 60, str(y): 0}}
    assert peer.text(**likely, presence_penalty=2).choices[0].text == "x" * 6
    assert peer.text(**likely, presence_penalty=-2).choices[0].text == "x" * 6
    plain = peer.text(max_tokens=60).choices[0].text
    assert peer.text(max_tokens=60, presence_penalty=2).choices[0].text != plain


@conformance_case(BOTH, "repetition_penalty", "above 0 to 10, over prompt and output")
def _repetition(peer: ApiUnderTest) -> None:
    plain = peer.text(max_tokens=60).choices[0].text
    assert peer.text(max_tokens=60, repetition_penalty=1.0).choices[0].text == plain
    assert peer.text(max_tokens=60, repetition_penalty=3.0).choices[0].text != plain


@conformance_case(BOTH, "logit_bias", "up to 1024 tokens, -100 to 100, before penalties")
def _logit_bias(peer: ApiUnderTest) -> None:
    [x] = peer.tokens("x")
    assert peer.text(logit_bias={str(x): 100}).choices[0].text == "x" * 12
    assert "x" not in peer.text(logit_bias={str(x): -100}, max_tokens=60).choices[0].text


@conformance_case(BOTH, "allowed_token_ids, bad_words", "the only tokens; words that may not come")
def _allowed(peer: ApiUnderTest) -> None:
    [x, y] = peer.tokens("xy")
    text = peer.text(allowed_token_ids=[x, y]).choices[0].text
    assert set(text) <= {"x", "y"}
    banned = peer.text(allowed_token_ids=[x, y], bad_words=["xx", "yy"]).choices[0].text
    assert banned in ("xy" * 6, "yx" * 6)


@conformance_case(
    BOTH, "response_format", "`text`, `json_object`, `json_schema`: held to it, token by token"
)
def _response_format(peer: ApiUnderTest) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    choice = peer.chat(response_format=schema, max_tokens=150).choices[0]
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert person["name"] in ("Ada", "Bob")
    assert isinstance(person["age"], int)
    text = _message_content(peer.chat(response_format={"type": "json_object"}, max_tokens=60))
    assert text.startswith("{")


@conformance_case(
    BOTH, "structured_outputs", "vLLM's `json`, `json_object`, `regex`, `choice`, `grammar`"
)
def _structured(peer: ApiUnderTest) -> None:
    def write(**how: Any) -> str:
        choice = peer.chat(structured_outputs=how, max_tokens=150).choices[0]
        assert choice.finish_reason == "stop"
        return str(choice.message.content)

    assert json.loads(write(json=PERSON)).keys() == {"name", "age"}
    assert re.fullmatch("[a-c]{3}[0-9]{2}", write(regex="[a-c]{3}[0-9]{2}"))
    assert write(choice=["yes", "no"]) in ("yes", "no")
    assert write(grammar='root ::= "<" [a-z] [a-z] ">"')[::3] == "<>"


@conformance_case(
    BOTH, "guided_json, guided_regex, guided_choice, guided_grammar", "vLLM's older names"
)
def _guided(peer: ApiUnderTest) -> None:
    assert peer.text(guided_choice=["left"]).choices[0].text == "left"
    assert re.fullmatch("[0-9]{4}", peer.text(guided_regex="[0-9]{4}").choices[0].text)
    assert peer.text(guided_grammar='root ::= "a" "b"').choices[0].text == "ab"
    assert peer.text(guided_json={"const": 5}).choices[0].text == "5"


@conformance_case(BOTH, "stream_options", "`include_usage`, and vLLM's `continuous_usage_stats`")
def _stream_options(peer: ApiUnderTest) -> None:
    *chunks, last = peer.chat(stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert all(chunk.usage is None for chunk in chunks)
    both = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in peer.text(stream=True, stream_options=both)]
    assert counts == sorted(counts)
    assert counts[-1] == 12


@conformance_case(
    BOTH,
    "user, metadata, store, safety_identifier, prompt_cache_key, service_tier",
    "taken and without effect (`service_tier` as `auto` or `default`, told as `default`); unknown "
    "fields likewise",
)
def _accepted(peer: ApiUnderTest) -> None:
    answer = peer.chat(
        user="me",
        metadata={"a": "b"},
        store=True,
        safety_identifier="x",
        prompt_cache_key="y",
        service_tier="auto",
        some_future_parameter={"x": 1},
    )
    assert _message_content(answer) == _message_content(peer.chat())
    assert answer.service_tier == "default"
    assert peer.chat().service_tier is None


@conformance_case(BOTH, "X-Request-Id", "echoed, or made")
def _request_id(peer: ApiUnderTest) -> None:
    answer = peer.client.with_raw_response.models.list(extra_headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"


@conformance_case(
    CHAT, "messages", "system, developer, user, assistant with `tool_calls`, tool; text parts"
)
def _messages(peer: ApiUnderTest) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u", "name": "me"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    answer = _chat(peer.tools, messages=messages)
    assert answer.choices[0].message.role == "assistant"


@conformance_case(CHAT, "max_completion_tokens", "as `max_tokens`, and before it")
def _max_completion_tokens(peer: ApiUnderTest) -> None:
    assert peer.chat(max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


@conformance_case(CHAT, "logprobs, top_logprobs", "up to 20, of the model's own distribution")
def _chat_logprobs(peer: ApiUnderTest) -> None:
    asked = {"logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 2}
    whole = peer.chat(**asked).choices[0]
    content = whole.logprobs.content
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == whole.message.content
    assert [len(entry.top_logprobs) for entry in content] == [3] * len(content)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob <= 0 for entry in content)
    assert sum(math.exp(top.logprob) for top in content[0].top_logprobs) <= 1
    chunks = [chunk.choices[0] for chunk in peer.chat(stream=True, **asked)]
    streamed = [e for chunk in chunks if chunk.logprobs for e in chunk.logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-3)


def _calls(client: openai.OpenAI, **asked: Any) -> tuple[list[tuple[str, Any]], str]:
    """Return the calls of an answer, whole and streamed alike, and its finish reason."""
    asked = {"tools": [WEATHER, CLOCK], "max_tokens": 300, **asked}
    choice = _chat(client, **asked).choices[0]
    calls = choice.message.tool_calls or []
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls)
    whole = [(call.function.name, call.function.arguments) for call in calls]
    streamed: list[list[str]] = []
    reason = None
    for chunk in _chat(client, stream=True, **asked):
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.index == len(streamed):
                assert part.id.startswith("call_")
                streamed.append([part.function.name, ""])
            streamed[part.index][1] += part.function.arguments
        reason = chunk.choices[0].finish_reason
    assert [tuple(call) for call in streamed] == whole
    assert reason == choice.finish_reason
    return [(name, json.loads(arguments)) for name, arguments in whole], choice.finish_reason


def _forced_tool_calls(*calls: str) -> dict[str, Any]:
    text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return {"structured_outputs": {"choice": [text]}}


@conformance_case(
    CHAT,
    "tools, tool_choice auto",
    "through the model's chat template, which must take tools; calls are read in the forms of "
    "Hermes and Qwen, Mistral, Llama 3; finish reason `tool_calls`",
)
def _tools_auto(peer: ApiUnderTest) -> None:
    first = '{"name": "weather", "arguments": {"city": "Rome"}}'
    second = '{"name": "clock", "arguments": {}}'
    calls, reason = _calls(peer.tools, **_forced_tool_calls(first, second))
    assert calls == [("weather", {"city": "Rome"}), ("clock", {})]
    assert reason == "tool_calls"
    plain = _chat(peer.tools, tools=[CLOCK]).choices[0]
    assert (plain.message.tool_calls, plain.finish_reason) == (None, "length")


@conformance_case(CHAT, "tool_choice none", "the model is not told of the tools")
def _tools_none(peer: ApiUnderTest) -> None:
    asked = {"tools": [WEATHER], "tool_choice": "none"}
    assert _message_content(_chat(peer.tools, **asked)) == _message_content(_chat(peer.tools))


@conformance_case(
    CHAT, "tool_choice required", "held to calls whose arguments fit the tools' schemas"
)
def _tools_required(peer: ApiUnderTest) -> None:
    calls, reason = _calls(peer.tools, tool_choice="required", parallel_tool_calls=False)
    [(name, arguments)] = calls
    assert name in ("weather", "clock")
    if name == "weather":
        assert arguments["city"] in ("Rome", "Oslo")
    assert reason == "tool_calls"


@conformance_case(
    CHAT, "tool_choice of a function", "held to one call of it; finish reason `stop`, as OpenAI's"
)
def _tools_named(peer: ApiUnderTest) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    [(name, arguments)], reason = _calls(peer.tools, tool_choice=choice)
    assert (name, reason) == ("weather", "stop")
    assert arguments in ({"city": "Rome"}, {"city": "Oslo"})


@conformance_case(CHAT, "parallel_tool_calls", "false reads, and allows, one call only")
def _parallel(peer: ApiUnderTest) -> None:
    call = '{"name": "clock", "arguments": {}}'
    calls, _ = _calls(peer.tools, parallel_tool_calls=False, **_forced_tool_calls(call, call))
    assert calls == [("clock", {})]


@conformance_case(CHAT, "tools with response_format", "calls, or else JSON of the schema")
def _tools_or_json(peer: ApiUnderTest) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": 1}}}}
    message = _chat(peer.tools, tools=[WEATHER], response_format=schema, max_tokens=300)
    said = message.choices[0].message
    assert said.tool_calls or json.loads(said.content) == {"a": 1}


@conformance_case(CHAT, "reasoning_effort", "where the model's chat template takes it")
def _reasoning_effort(peer: ApiUnderTest) -> None:
    effort = _chat(peer.tools, reasoning_effort="low")
    assert effort.usage.prompt_tokens > _chat(peer.tools).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as refused:
        peer.chat(reasoning_effort="low")
    assert refused.value.param == "reasoning_effort"


@conformance_case(CHAT, "chat_template_kwargs", "variables of the chat template")
def _template_kwargs(peer: ApiUnderTest) -> None:
    gloomy = _chat(peer.tools, chat_template_kwargs={"mood": "gloomy"})
    assert gloomy.usage.prompt_tokens > _chat(peer.tools).usage.prompt_tokens


@conformance_case(CHAT, "add_generation_prompt, continue_final_message", "the last message goes on")
def _continue(peer: ApiUnderTest) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "jumps"}]
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    answer = peer.chat(messages=messages, **asked)
    ids = peer.codec.encode_chat(MESSAGES) + peer.tokens("jumps")
    assert answer.usage.prompt_tokens == len(ids)
    assert _message_content(answer) == peer.text(prompt=ids).choices[0].text


@conformance_case(TEXT, "prompt", "a string, strings, tokens, or lists of tokens")
def _prompt(peer: ApiUnderTest) -> None:
    ids = peer.tokens("fox")
    texts = {peer.text(prompt=prompt).choices[0].text for prompt in ("fox", ["fox"], ids, [ids])}
    assert len(texts) == 1


@conformance_case(TEXT, "logprobs", "up to 20, in OpenAI's older form; not together with `echo`")
def _text_logprobs(peer: ApiUnderTest) -> None:
    asked = {"logprobs": 2, "allowed_token_ids": peer.tokens("abcdefgh")}
    choice = peer.text(**asked).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(12))
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob <= max(top.values()) < 0
        assert 2 <= len(top) <= 3  # the chosen one is told though it is not of the likeliest
    parts = [c.choices[0].logprobs for c in peer.text(stream=True, **asked)]
    assert [token for part in parts if part for token in part.tokens] == found.tokens
    assert [at for part in parts if part for at in part.text_offset] == found.text_offset


@conformance_case(TEXT, "echo", "the prompt is told ahead of the text")
def _echo(peer: ApiUnderTest) -> None:
    text = peer.text(prompt=["a 日", "b"], n=2).choices
    echoed = peer.text(prompt=["a 日", "b"], n=2, echo=True).choices
    assert [choice.text for choice in echoed] == [
        prompt + choice.text for prompt, choice in zip(["a 日"] * 2 + ["b"] * 2, text, strict=True)
    ]
    streamed = "".join(c.choices[0].text for c in peer.text(prompt="fox", echo=True, stream=True))
    assert streamed == "fox" + peer.text(prompt="fox").choices[0].text


@conformance_case(TEXT, "best_of", "as much as `n` only")
def _best_of(peer: ApiUnderTest) -> None:
    assert len(peer.text(n=2, best_of=2).choices) == 2
    with pytest.raises(openai.BadRequestError) as refused:
        peer.text(n=2, best_of=3)
    assert refused.value.param == "best_of"


@conformance_case(
    ANSWERS, "system_fingerprint", "of the weights, their format, and what they run on"
)
def _fingerprint(peer: ApiUnderTest) -> None:
    told = {chunk.system_fingerprint for chunk in peer.chat(stream=True)}
    assert {peer.chat().system_fingerprint, peer.text().system_fingerprint} == told
    assert re.fullmatch("fp_[0-9a-f]{12}", told.pop())


@conformance_case(
    ANSWERS,
    "usage.prompt_tokens_details",
    "`cached_tokens`: of the tenant's own earlier prompts only, see [tenants](tenants.md); null in "
    "a stream until it is known",
)
def _prompt_details(peer: ApiUnderTest) -> None:
    both = {"include_usage": True, "continuous_usage_stats": True}
    whole = peer.chat(n=2).usage
    assert whole.prompt_tokens_details.cached_tokens == 0  # nothing is shared without tenants
    first, *_, last = peer.chat(stream=True, stream_options=both)
    assert first.usage.prompt_tokens_details is None
    assert last.usage.prompt_tokens_details == whole.prompt_tokens_details


@conformance_case(
    ANSWERS,
    "usage.completion_tokens_details",
    "nothing is predicted, and what a model thinks is told as text: all are 0",
)
def _completion_details(peer: ApiUnderTest) -> None:
    for answer in (peer.chat(), peer.text()):
        details = answer.usage.completion_tokens_details
        assert (details.reasoning_tokens, details.audio_tokens) == (0, 0)
        assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0


@conformance_case(
    ANSWERS,
    "choices[].stop_reason",
    "vLLM's: the stop string, or the token of `stop_token_ids`, that ended the text; else null",
)
def _stop_reason(peer: ApiUnderTest) -> None:
    letters = {"allowed_token_ids": peer.tokens("abcdefgh")}
    plain = peer.text(**letters).choices[0]
    assert plain.stop_reason is None
    [token] = peer.tokens(plain.text[3])
    for stop, how in ((plain.text[3], "stop"), (token, "stop_token_ids")):
        asked = {how: [stop], **letters}
        assert peer.text(**asked).choices[0].stop_reason == stop
        assert [*peer.text(stream=True, **asked)][-1].choices[0].stop_reason == stop
        chat = {how: [stop], "allowed_token_ids": [token]}
        assert peer.chat(**chat).choices[0].stop_reason == stop
        assert [*peer.chat(stream=True, **chat)][-1].choices[0].stop_reason == stop
    ended = peer.text(allowed_token_ids=[0, 1]).choices[0]
    assert ended.stop_reason is None


@pytest.mark.parametrize(
    "held", [pytest.param(c, id=f"{c.section}-{c.name}".replace(" ", "-")) for c in CASES]
)
def test_the_server_does_what_the_document_says(held: ConformanceCase, peer: ApiUnderTest) -> None:
    held.check(peer)


REFUSED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **dict.fromkeys(validation.UNSUPPORTED_CHAT_PARAMS, "something"),
        "priority": 2,
    },
    "/v1/completions": {**dict.fromkeys(validation.UNSUPPORTED_COMPLETION_PARAMS, "something")},
}


@pytest.mark.parametrize(
    ("path", "name"),
    [pytest.param(path, name, id=f"{path}-{name}") for path in REFUSED for name in REFUSED[path]],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    path: str, name: str, peer: ApiUnderTest
) -> None:
    if (path, name) in {("/v1/chat/completions", "best_of"), ("/v1/completions", "best_of")}:
        value: Any = 7
    else:
        value = REFUSED[path][name]
    body = {"model": "tiny", "messages": MESSAGES, "prompt": "a", "max_tokens": 1, name: value}
    error = peer.http.post(path, json=body).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


HEAD = """\
# The OpenAI-compatible surface

What clients may ask, and what they get. Every row is a test by the unmodified `openai` client, or
by plain HTTP where it has no method (`tests/router/api/test_conformance.py`, which writes this
document).

- Unknown fields are ignored, as clients expect. A field that is known and cannot be honoured is
  refused by name: 400, `unsupported_parameter`, with `param`.
- Errors are OpenAI's objects everywhere: `{"error": {"message", "type", "param", "code"}}`; within
  a stream as its last event, `data: {"error": ...}`, and no `[DONE]` after it.
- A client that hangs up frees what it asked for.
- Log-probabilities are of the model's own distribution (log-softmax of its scores), as OpenAI's and
  vLLM's are: before temperature, biases, penalties and grammars.
- Scores pass, in this order: `logit_bias`, forbidden and allowed tokens; penalties; grammars;
  temperature, `min_p`, `top_k`, `top_p`.
- Constrained text is held by llguidance: JSON schemas without `not`, `if`, `contains`,
  `uniqueItems` and what it does not know, which are refused by name; at most 64 KiB; a grammar that
  takes too much time ends its request alone, with an error. JSON's whitespace is at most 16
  characters at a time.
- A request whose constraints leave no token that may come next ends with 400.
"""


def document() -> str:
    """Return the whole document."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    for section in (ENDPOINTS, BOTH, CHAT, TEXT, ANSWERS):
        yield from (f"## {section}", "", f"| {_header(section)} | |", "|---|---|")
        for held in CASES:
            if held.section == section:
                names = held.name if section == ENDPOINTS else _code(held.name)
                yield f"| {names} | {held.description} |"
        yield ""
    yield "## Refused by name"
    yield ""
    for path, refused in REFUSED.items():
        yield f"- `{path}`: {', '.join(f'`{name}`' for name in sorted(refused))}"


def _header(section: str) -> str:
    return {ENDPOINTS: "endpoint", ANSWERS: "field"}.get(section, "parameter")


def _code(name: str) -> str:
    return ", ".join(f"`{part}`" for part in name.split(", "))


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document()


if __name__ == "__main__":
    DOCUMENT.write_text(document())
