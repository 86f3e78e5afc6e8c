"""Invalid requests get one error in OpenAI's shape that names the field."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from faasmoe_router.api import preparation
from faasmoe_router.api.preparation import MAX_CONCURRENT_PREPARATIONS
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = {**CALL, "function": {"name": "f", "arguments": 5}}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        pytest.param({"messages": None}, "messages", "invalid_type", id="null-messages"),
        pytest.param({"messages": []}, "messages", "invalid_value", id="no-messages"),
        pytest.param({"messages": "hi"}, "messages", "invalid_type", id="text-for-messages"),
        pytest.param({"messages": ["hi"]}, "messages[0]", "invalid_type", id="text-for-message"),
        pytest.param(
            {"messages": [{"role": "<king>", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
            id="role",
        ),
        pytest.param(
            {"messages": [*MESSAGES, {"role": "user"}]},
            "messages[1].content",
            "missing_required_parameter",
            id="no-content",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "invalid_type",
            id="number-for-content",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "invalid_value",
            id="null-content",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_value",
            id="image",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "missing_required_parameter",
            id="tool-call-without-id",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}]},
            "messages[0].tool_calls[0].id",
            "invalid_type",
            id="number-for-call-id",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
            "invalid_type",
            id="number-for-arguments",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "invalid_value",
            id="tool-calls-of-user",
        ),
        pytest.param(
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages",
            "invalid_value",
            id="template-error",
        ),
        pytest.param({"model": 3}, "model", "invalid_type", id="number-for-model"),
        pytest.param({"max_tokens": -1}, "max_tokens", "invalid_value", id="negative"),
        pytest.param({"max_tokens": 0}, "max_tokens", "invalid_value", id="zero"),
        pytest.param({"max_tokens": "5"}, "max_tokens", "invalid_type", id="text-for-int"),
        pytest.param({"max_tokens": True}, "max_tokens", "invalid_type", id="bool-for-int"),
        pytest.param({"max_tokens": 2.5}, "max_tokens", "invalid_type", id="float-for-int"),
        pytest.param({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded", id="huge"),
        pytest.param(
            {"max_completion_tokens": 300},
            "max_completion_tokens",
            "context_length_exceeded",
            id="long-completion",
        ),
        pytest.param({"n": 13}, "n", "invalid_value", id="more-choices-than-capacity"),
        pytest.param({"temperature": 2.1}, "temperature", "invalid_value", id="hot"),
        pytest.param({"temperature": -0.1}, "temperature", "invalid_value", id="cold"),
        pytest.param({"temperature": "1"}, "temperature", "invalid_type", id="text-for-float"),
        pytest.param({"temperature": False}, "temperature", "invalid_type", id="bool-for-float"),
        pytest.param({"top_p": 1.5}, "top_p", "invalid_value", id="top_p"),
        pytest.param({"top_k": -2}, "top_k", "invalid_value", id="top_k"),
        pytest.param({"seed": 2**63}, "seed", "invalid_value", id="seed-too-large"),
        *(
            pytest.param({name: value}, name, f"invalid_{fault}", id=f"{name}={value}"[:60])
            for name, value, fault in [
                ("allowed_token_ids", [1.5], "type"),
                ("allowed_token_ids", [10**6], "value"),
                ("allowed_token_ids", list(range(1025)), "value"),
                ("bad_words", "x", "type"),
                ("bad_words", [""], "value"),
                ("bad_words", ["x"] * 65, "value"),
                ("frequency_penalty", 2.1, "value"),
                ("logit_bias", [1], "type"),
                ("logit_bias", {"x": 1}, "value"),
                ("logit_bias", {"-5": 1}, "value"),
                ("logit_bias", {"5": 101}, "value"),
                ("logit_bias", {"5": True}, "type"),
                ("logit_bias", {"5": None}, "type"),
                ("logit_bias", {"999999": 1}, "value"),
                ("logprobs", 1, "type"),
                ("top_logprobs", 3, "value"),
                ("top_logprobs", 21, "value"),
                ("min_p", 1.5, "value"),
                ("min_tokens", 3, "value"),
                ("min_tokens", -1, "value"),
                ("presence_penalty", -3, "value"),
                ("repetition_penalty", 0, "value"),
                ("reasoning_effort", "huge", "value"),
                ("stop_token_ids", [10**6], "value"),
                ("stop_token_ids", [-1], "type"),
                ("continue_final_message", True, "value"),
                ("chat_template_kwargs", [1], "type"),
                ("response_format", "json", "type"),
                ("response_format", {}, "value"),
                ("response_format", {"type": "grammar"}, "value"),
                ("response_format", {"type": "json_schema"}, "value"),
                ("structured_outputs", {"json": {}, "regex": "a"}, "value"),
                ("structured_outputs", {"regex": ""}, "type"),
                ("structured_outputs", {"choice": []}, "type"),
                ("structured_outputs", {"whitespace_pattern": " "}, "value"),
                ("guided_json", 5, "type"),
                ("guided_json", "{", "value"),
                ("guided_regex", "(", "value"),
                ("guided_grammar", "root ::= missing", "value"),
                ("tools", "x", "type"),
                ("tool_choice", "required", "value"),
                ("tool_choice", 5, "type"),
                ("tool_choice", {"type": "function"}, "value"),
                ("tool_choice", "sometimes", "value"),
            ]
        ),
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "invalid_value",
            id="tool-name",
        ),
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
            "invalid_type",
            id="list-for-parameters",
        ),
        pytest.param({"tools": [TOOL, TOOL]}, "tools", "invalid_value", id="duplicate-tool-names"),
        pytest.param(
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "invalid_value",
            id="unknown-tool",
        ),
        pytest.param(
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
            "invalid_value",
            id="two-grammars",
        ),
        pytest.param(
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages",
            "invalid_value",
            id="reserved-template-variable",
        ),
        pytest.param({"stop": 5}, "stop", "invalid_type", id="number-for-stop"),
        pytest.param({"stop": [1]}, "stop", "invalid_type", id="numbers-for-stops"),
        pytest.param({"stop": ["a"] * 5}, "stop", "invalid_value", id="five-stops"),
        pytest.param({"stop": ""}, "stop", "invalid_value", id="empty-stop"),
        pytest.param({"n": 0}, "n", "invalid_value", id="n-zero"),
        pytest.param({"n": 129}, "n", "invalid_value", id="n-large"),
        pytest.param({"stream": "yes"}, "stream", "invalid_type", id="text-for-bool"),
        pytest.param(
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "invalid_value",
            id="stream-options-without-stream",
        ),
        pytest.param(
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "invalid_type",
            id="number-for-nested-bool",
        ),
        *(
            pytest.param({name: value}, name, "unsupported_parameter", id=name)
            for name, value in [
                ("audio", {"voice": "alloy", "format": "wav"}),
                ("best_of", 2),
                ("chat_template", "{{ messages }}"),
                ("documents", [{"text": "x"}]),
                ("function_call", {"name": "f"}),
                ("functions", [{}]),
                ("length_penalty", 2),
                ("modalities", ["text", "audio"]),
                ("prediction", {"type": "content", "content": "x"}),
                ("use_beam_search", True),
                ("verbosity", "low"),
                ("web_search_options", {}),
            ]
        ),
    ],
)
def test_chat_error_names_the_invalid_field(
    http: httpx.Client, change: dict[str, Any], param: str, code: str
) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT, **change})
    error = _error(response)
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        param,
        code,
    )
    assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        pytest.param({"prompt": None}, "prompt", "invalid_type", id="null"),
        pytest.param({"prompt": []}, "prompt", "invalid_type", id="no-prompts"),
        pytest.param({"prompt": ""}, "prompt", "invalid_value", id="no-tokens"),
        pytest.param({"prompt": {"a": 1}}, "prompt", "invalid_type", id="object"),
        pytest.param({"prompt": ["a", 5]}, "prompt", "invalid_type", id="mixed"),
        pytest.param({"prompt": [1, "a"]}, "prompt", "invalid_type", id="mixed-tokens"),
        pytest.param({"prompt": [True]}, "prompt", "invalid_type", id="bools"),
        pytest.param({"prompt": [-1]}, "prompt", "invalid_type", id="negative-token"),
        pytest.param({"prompt": ["x"] * 129}, "prompt", "invalid_value", id="too-many"),
        pytest.param({"prompt": ["x"] * 13}, "prompt", "invalid_value", id="more-than-capacity"),
        pytest.param({"prompt": ["x"] * 7, "n": 2}, "n", "invalid_value", id="times-n"),
        pytest.param({"prompt": [[1], [10**6]]}, "prompt[1]", "invalid_value", id="unknown-token"),
        pytest.param({"suffix": "x"}, "suffix", "unsupported_parameter", id="suffix"),
        pytest.param({"best_of": 2}, "best_of", "unsupported_parameter", id="best_of"),
        pytest.param({"logprobs": 21}, "logprobs", "invalid_value", id="logprobs"),
        pytest.param({"tools": [TOOL]}, "tools", "unsupported_parameter", id="tools"),
    ],
)
def test_completion_error_names_the_invalid_field(
    http: httpx.Client, change: dict[str, Any], param: str, code: str
) -> None:
    response = http.post("/v1/completions", json={**TEXT, **change})
    error = _error(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        pytest.param(b'{"model": }', "invalid_json", "Expecting value at character 10", id="cut"),
        pytest.param(b"[]", "invalid_type", "must be a JSON object", id="list"),
        pytest.param(b"null", "invalid_type", "must be a JSON object", id="null"),
        pytest.param(b"", "invalid_type", "must be a JSON object", id="empty"),
        pytest.param(
            b'{"model": "\xff"}', "invalid_json", "got byte 0xff at position 11", id="not-utf-8"
        ),
        pytest.param(b"[" * 15_000, "invalid_json", "nested too deeply", id="deep"),
        pytest.param(
            b'{"model": ' + b"9" * 5000 + b"}", "invalid_json", "than 4300 digits", id="long-number"
        ),
    ],
)
def test_body_that_is_not_a_json_object_is_rejected(
    http: httpx.Client, content: bytes, code: str, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    error = _error(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        pytest.param("4", '"4"', id="number-as-text"),
        pytest.param("\u00e9\u200f\n", '"\u00e9\\u200f\\n"', id="unprintable"),
        pytest.param(True, "true", id="bool"),
        pytest.param("a" * 200, '"' + "a" * 79 + "...", id="long"),
    ],
)
def test_error_quotes_the_value_as_json(http: httpx.Client, value: Any, quoted: str) -> None:
    error = _error(http.post("/v1/chat/completions", json={**CHAT, "seed": value}))
    assert error["message"].endswith(f", got {quoted}.")


def test_deeply_nested_value_is_rejected_cleanly(http: httpx.Client) -> None:
    for depth in range(100, 3000, 100):
        seed = b"[" * depth + b"]" * depth
        content = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"seed":%s}' % seed
        headers = {"Content-Type": "application/json"}
        response = http.post("/v1/chat/completions", content=content, headers=headers)
        assert (response.status_code, _error(response)["type"]) == (400, "invalid_request_error")


def test_text_too_long_for_the_context_is_rejected_before_tokenization(
    http: httpx.Client, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens = engine.limits.max_model_len
    size_bytes = n_tokens * engine.tokenizer.max_token_bytes + 1
    assert size_bytes < 19_000
    monkeypatch.setattr(ModelTokenizer, "encode", None)
    monkeypatch.setattr(ModelTokenizer, "encode_chat", None)
    text = "x" * size_bytes
    chat = [{"role": "user", "content": part} for part in (text[:-9], text[-9:])]
    for path, body, param in (
        ("/v1/completions", {**TEXT, "prompt": ["hi", text]}, "prompt"),
        ("/v1/chat/completions", {**CHAT, "messages": chat}, "messages"),
    ):
        response = http.post(path, json=body)
        error = _error(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert (error["param"], f"{size_bytes} bytes" in error["message"]) == (param, True)


def test_concurrent_tokenizations_are_limited(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, never_released = ModelTokenizer.encode, threading.Semaphore(0)
    lock, is_full = threading.Lock(), threading.Event()
    n_running = max_running = 0

    def slow_encode(
        model_tokenizer: ModelTokenizer, text: str, *, add_special_tokens: bool
    ) -> list[int]:
        nonlocal n_running, max_running
        with lock:
            n_running += 1
            max_running = max(max_running, n_running)
        if n_running >= MAX_CONCURRENT_PREPARATIONS:
            is_full.set()
        assert is_full.wait(120)
        never_released.acquire(timeout=0.1)  # gives more requests time to overlap
        with lock:
            n_running -= 1
        return encode(model_tokenizer, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", slow_encode)
    monkeypatch.setattr(preparation, "INLINE_BYTES", 0)
    with ThreadPoolExecutor(6) as pool:
        responses = pool.map(lambda _: http.post("/v1/completions", json=TEXT), range(6))
        assert [response.status_code for response in responses] == [200] * 6
    assert max_running == MAX_CONCURRENT_PREPARATIONS


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            rb'{"model":"tiny","messages":[{"role":"user","content":"\ud800"}]}', id="content"
        ),
        pytest.param(
            rb'{"model":"tiny","messages":[{"role":"user","content":"a","name":"\ud800"}]}',
            id="name",
        ),
        pytest.param(rb'{"model":"\ud800","messages":[{"role":"user","content":"a"}]}', id="model"),
    ],
)
def test_lone_surrogate_is_rejected(http: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert _error(response)["code"] == "invalid_type"


def test_nan_is_rejected(http: httpx.Client) -> None:
    content = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":NaN}'
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert (response.status_code, _error(response)["param"]) == (400, "temperature")


def test_missing_content_type_is_named(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=b"{}")
    assert response.status_code == 400
    assert "Content-Type: application/json" in _error(response)["message"]


def test_missing_prompt_is_named(http: httpx.Client) -> None:
    error = _error(http.post("/v1/completions", json={"model": "tiny"}))
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


def test_unknown_model_name_is_quoted_and_escaped(http: httpx.Client) -> None:
    error = _error(http.post("/v1/chat/completions", json={**CHAT, "model": "caf\u00e9\u202e"}))
    assert "`caf\u00e9\\u202e` does not exist" in error["message"]


def test_unknown_model_returns_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as rejected:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])
    assert (rejected.value.code, rejected.value.param) == ("model_not_found", "model")
    assert "`gpt-9` does not exist" in str(rejected.value)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/chat/completions", {**CHAT, "max_tokens": 250}, id="with-completion"),
        pytest.param(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "x" * 400}]},
            id="chat-alone",
        ),
        pytest.param("/v1/completions", {"model": "tiny", "prompt": [5] * 256}, id="tokens"),
    ],
)
def test_request_longer_than_the_context_is_rejected(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json=body)
    error = _error(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 256 tokens" in error["message"]


def _body_chunks(n_bytes: int) -> Iterator[bytes]:
    for _ in range(n_bytes // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("declared", [True, False])
def test_large_body_is_rejected(http: httpx.Client, declared: bool) -> None:
    content = b" " * 30_000 if declared else _body_chunks(30_000)
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 413
    error = _error(response)
    assert error["code"] == "request_too_large"
    assert "at most 20000 bytes" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        pytest.param("GET", "/v1/nothing", 404, "not_found", id="404"),
        pytest.param("GET", "/v1/chat/completions", 405, "method_not_allowed", id="405"),
        pytest.param("GET", "/v1/models/none", 404, "model_not_found", id="model"),
    ],
)
def test_unknown_urls_return_openai_errors(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)
    assert (response.status_code, _error(response)["code"]) == (status, code)
