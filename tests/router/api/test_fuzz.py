"""Fuzzing: any input gets a response or a clear error in bounded time, and the server survives.

Requests come from schemathesis and the app's OpenAPI schema, from strategies for what the schema
does not express, and from hand-written worst cases. The number of requests is fixed.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

Body = dict[str, Any]
MAX_RESPONSE_S = 120.0
MAX_CPU_S = 20.0  # of the whole process for one request
N_CASES = 15
N_BODIES = 200
MAX_MEMORY_GROWTH_BYTES = 256 << 20
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: Body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
TEXT: Body = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA_CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def fuzzed(tool_server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tool_server, timeout=MAX_RESPONSE_S) as http:
        yield http


def _check(response: httpx.Response) -> None:
    """Assert that the response is a success or an OpenAI-shaped client error."""
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404, 405, 413, 429, 501), response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert len(error["message"]) < 2000


def _assert_alive(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_requests_generated_from_the_openapi_schema(tool_server: str, fuzzed: httpx.Client) -> None:
    schema = schemathesis.openapi.from_url(f"{tool_server}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 12
    for operation in operations:
        _send_cases(operation)
    _assert_alive(fuzzed)


def _send_cases(operation: Any) -> None:
    @settings(FUZZ, max_examples=N_CASES)
    @given(case=operation.as_strategy(), is_valid_model=st.booleans())
    def send(case: Any, is_valid_model: bool) -> None:
        if is_valid_model and isinstance(case.body, dict):  # passes the first check
            case.body = {**case.body, "model": "tiny", "max_tokens": 2}
        response = case.call(timeout=MAX_RESPONSE_S)
        status = response.status_code
        assert status < 500 or status == 501, response.text
        if status >= 400:
            assert list(response.json()["error"]) == ["message", "type", "param", "code"]
        case.validate_response(response, checks=SCHEMA_CHECKS)

    send()


NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63) - 1, 10**300, 1e308, -1e308, 5e-324, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
)
STRINGS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "\x00",
            "\ud800",
            "\u202e",
            "\U0010ffff",
            "\ufeff",
            "a" * 3000,
            "{}",
            "null",
            "<|end|>",
        ]
    ),
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=8,
)
SCHEMAS = st.recursive(
    st.sampled_from(
        [{}, {"type": "string"}, {"type": "integer"}, {"const": 1}, {"enum": ["a", 2]}, {"not": {}}]
    ),
    lambda inner: (
        st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(STRINGS, inner, max_size=3)}
        )
        | st.fixed_dictionaries({"type": st.just("string"), "pattern": STRINGS})
    ),
    max_leaves=6,
)
TOKENS = st.lists(st.integers(-1, 400), max_size=6)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "add_generation_prompt": st.booleans(),
    "allowed_token_ids": TOKENS,
    "bad_words": st.lists(STRINGS, max_size=3),
    "chat_template_kwargs": st.dictionaries(STRINGS, JUNK, max_size=3),
    "continue_final_message": st.booleans(),
    "echo": st.booleans(),
    "frequency_penalty": st.floats(-2, 2),
    "guided_choice": st.lists(STRINGS, max_size=4),
    "guided_grammar": STRINGS | st.sampled_from(["root ::= root", "start: /[/", 'start: "a"*']),
    "guided_regex": STRINGS | st.from_regex(r"[\[\](){}|*+?^$\\a-c.]{0,20}", fullmatch=True),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), NUMBERS, max_size=4),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "max_tokens": st.integers(1, 4),
    "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 4),
    "n": st.integers(1, 3),
    "presence_penalty": st.floats(-2, 2),
    "prompt": STRINGS | TOKENS | st.lists(STRINGS | TOKENS, max_size=3),
    "repetition_penalty": st.floats(0, 10),
    "response_format": st.fixed_dictionaries(
        {
            "type": st.sampled_from(["text", "json_object", "json_schema"]),
            "json_schema": st.fixed_dictionaries({"name": STRINGS, "schema": SCHEMAS}),
        }
    ),
    "seed": NUMBERS,
    "skip_special_tokens": st.booleans(),
    "stop": STRINGS | st.lists(STRINGS, max_size=5),
    "stop_token_ids": TOKENS,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "structured_outputs": st.fixed_dictionaries({"json": SCHEMAS}),
    "temperature": st.floats(0, 2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function"}]),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries(
                    {"name": st.just("f") | STRINGS, "parameters": SCHEMAS}
                ),
            }
        ),
        max_size=2,
    ),
    "top_k": st.integers(-1, 400),
    "top_logprobs": st.integers(0, 20),
    "top_p": st.floats(0, 1),
}
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | STRINGS,
        "content": STRINGS
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": STRINGS})),
    },
    optional={
        "name": STRINGS,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "id": STRINGS,
                    "function": st.fixed_dictionaries({"name": STRINGS, "arguments": STRINGS}),
                }
            ),
            max_size=2,
        ),
    },
)
HEADERS = st.dictionaries(
    st.sampled_from([b"X-Request-Id", b"Accept", b"Authorization", b"X-Forwarded-For", b"Cookie"]),
    st.binary(max_size=20).map(
        lambda value: bytes(byte for byte in value if byte > 32 and byte != 127)
    ),
)


@st.composite
def _bodies(draw: st.DrawFn, base: Body) -> Body:
    """Return a valid body with random plausible parameters and at most one arbitrary field."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5, unique=True))
    body = {**base, **{name: draw(FIELDS[name]) for name in names}}
    if "messages" in base and draw(st.booleans()):
        body["messages"] = draw(st.lists(MESSAGE, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(sorted(FIELDS)) | STRINGS)] = draw(JUNK)
    return body


@pytest.mark.parametrize(
    ("path", "base"),
    [
        pytest.param("/v1/chat/completions", CHAT, id="chat"),
        pytest.param("/v1/completions", TEXT, id="text"),
        pytest.param("/tokenize", {"prompt": "a"}, id="tokenize"),
    ],
)
def test_bodies_with_random_parameters(fuzzed: httpx.Client, path: str, base: Body) -> None:
    statuses: Counter[int] = Counter()

    @settings(FUZZ, max_examples=N_BODIES)
    @given(body=_bodies(base), headers=HEADERS)
    def send(body: Body, headers: dict[bytes, bytes]) -> None:
        content = json.dumps(body).encode()
        all_headers = [*headers.items(), (b"Content-Type", b"application/json")]
        response = fuzzed.post(path, content=content, headers=all_headers)
        _check(response)
        statuses[response.status_code] += 1
        if response.status_code == 200 and body.get("stream") is True and path != "/tokenize":
            assert response.text.endswith("\n\n")

    send()
    assert statuses[200] > N_BODIES // 10, "too few bodies are valid to exercise generation"
    _assert_alive(fuzzed)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/detokenize"])
def test_malformed_bodies(fuzzed: httpx.Client, path: str) -> None:
    @settings(FUZZ, max_examples=40)
    @given(
        content=st.binary(max_size=60) | JUNK.map(lambda value: json.dumps(value).encode()),
        content_type=st.sampled_from(
            ["application/json", "text/plain", "multipart/form-data", "", "a/b;c=d"]
        ),
    )
    def send(content: bytes, content_type: str) -> None:
        _check(fuzzed.post(path, content=content, headers={"Content-Type": content_type}))

    send()


def _deep(n_levels: int) -> Any:
    return json.loads("[" * n_levels + "]" * n_levels)


LARGE: dict[str, tuple[str, Callable[[], Body]]] = {
    "stops": ("stop", lambda: {"stop": [f"s{i}" for i in range(10_000)]}),
    "biases": ("logit_bias", lambda: {"logit_bias": {str(i): 1 for i in range(100_000)}}),
    "bad-words": ("bad_words", lambda: {"bad_words": ["w" * 90] * 10_000}),
    "tools": ("tools", lambda: {"tools": [TOOL] * 10_000}),
    "long-tool": (
        "tools",
        lambda: {"tools": [{**TOOL, "function": {"name": "f", "description": "d" * 10**6}}]},
    ),
    "messages": ("messages", lambda: {"messages": MESSAGES * 30_000}),
    "text": ("messages", lambda: {"messages": [{"role": "user", "content": "日" * 10**6}]}),
    "deep-schema": ("guided_json", lambda: {"guided_json": {"anyOf": _deep(900)}}),
    "deep-variables": ("messages", lambda: {"chat_template_kwargs": {"mood": _deep(900)}}),
    "schema": (
        "response_format",
        lambda: {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"enum": [f"value-{i}" for i in range(50_000)]}},
            }
        },
    ),
    "choices": ("guided_choice", lambda: {"guided_choice": ["c"] * 100_000}),
    "regex": ("guided_regex", lambda: {"guided_regex": "(a|b)*" * 100_000}),
    "power": ("guided_regex", lambda: {"guided_regex": "((a{1000}){1000}){1000}"}),
    "parentheses": ("guided_regex", lambda: {"guided_regex": "(" * 20_000}),
    "doubling": (
        "guided_json",
        lambda: {
            "guided_json": {
                "allOf": [
                    {"oneOf": [{"properties": {f"p{i}{j}": {}}} for j in range(12)]}
                    for i in range(8)
                ]
            }
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_oversized_field_is_rejected_by_name(name: str, fuzzed: httpx.Client) -> None:
    param, make_fields = LARGE[name]
    start_s = time.process_time()
    response = fuzzed.post("/v1/chat/completions", json={**CHAT, **make_fields()})
    _check(response)
    # A template may ignore its variables; a grammar may become too complex at a later token.
    if name not in ("deep-variables", "power"):
        assert response.status_code == (413 if name == "text" else 400)
        assert name == "text" or str(response.json()["error"]["param"]).startswith(param)
    assert time.process_time() - start_s < MAX_CPU_S
    _assert_alive(fuzzed)


def test_ambiguous_grammar_does_not_block_other_requests(fuzzed: httpx.Client) -> None:
    grammar = 'start: start start | "a" start | "a"'
    body = {**TEXT, "max_tokens": 400, "guided_grammar": grammar, "ignore_eos": True}
    responses: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: responses.append(fuzzed.post("/v1/completions", json=body))
    )
    thread.start()
    while thread.is_alive():
        assert fuzzed.post("/v1/completions", json=TEXT).status_code == 200
    [response] = responses
    _check(response)


@pytest.mark.parametrize("stream", [False, True])
def test_contradicting_constraints_are_a_client_error(fuzzed: httpx.Client, stream: bool) -> None:
    body = {**TEXT, "guided_regex": "[0-9]+", "allowed_token_ids": [100], "stream": stream}
    response = fuzzed.post("/v1/completions", json=body)
    text = response.text
    if stream:
        assert "[DONE]" not in text
        text = text.splitlines()[-2].removeprefix("data: ")
    else:
        assert response.status_code == 400
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert "leave no token" in error["message"]


def _connect(http: httpx.Client) -> socket.socket:
    address = urlsplit(str(http.base_url))
    return socket.create_connection((address.hostname, address.port), timeout=MAX_RESPONSE_S)


HEAD_START = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BROKEN = {
    "truncated-head": HEAD_START,
    "truncated-body": HEAD_START + b'Content-Length: 900\r\n\r\n{"model": "tiny", "pro',
    "truncated-chunk": HEAD_START + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    "bad-chunk": HEAD_START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "bad-length": HEAD_START + b"Content-Length: -5\r\n\r\n",
    "two-lengths": HEAD_START + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "not-http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10,
    "long-head": HEAD_START + b"X-Long: " + b"a" * 200_000 + b"\r\n\r\n",
    "bad-path": b"GET /%ff%00/../../etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_clients_do_not_block_others(name: str, fuzzed: httpx.Client) -> None:
    connections = [_connect(fuzzed) for _ in range(8)]
    for connection in connections:
        connection.sendall(BROKEN[name])
    _assert_alive(fuzzed)  # while the broken connections are open
    for connection in connections:
        connection.close()
    _assert_alive(fuzzed)


def test_client_that_does_not_read_does_not_block_others(fuzzed: httpx.Client) -> None:
    body = json.dumps({**TEXT, "max_tokens": 900, "stream": True, "logprobs": 20}).encode()
    head = HEAD_START + b"Content-Length: %d\r\n\r\n" % len(body)
    with _connect(fuzzed) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head + body)
        for _ in range(5):
            _assert_alive(fuzzed)
    _assert_alive(fuzzed)


def test_memory_growth_is_bounded(fuzzed: httpx.Client) -> None:
    """Requests with ever new grammars do not grow the process's memory."""

    def send(index: int) -> None:
        schema = {"enum": [f"{index}-{n}" for n in range(300)]}
        body = {**CHAT, "guided_json": schema, "seed": index, "logprobs": True, "top_logprobs": 20}
        assert fuzzed.post("/v1/chat/completions", json=body).status_code == 200

    for index in range(70):  # fills the grammar cache
        send(index)
    before_bytes = psutil.Process().memory_info().rss
    for index in range(70, 140):
        send(index)
    assert psutil.Process().memory_info().rss - before_bytes < MAX_MEMORY_GROWTH_BYTES
