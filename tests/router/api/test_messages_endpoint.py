"""Anthropic's Messages API over plain HTTP; `make test-clients` runs its SDK."""

import json
from typing import Any

import httpx
import pytest

BODY: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 12,
    "temperature": 0,
    "messages": [{"role": "user", "content": "fox"}],
}
WEATHER = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def events_of(response: httpx.Response) -> list[Any]:
    lines = response.text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    return events


def test_text_is_that_of_a_chat(http: httpx.Client) -> None:
    body = {**BODY, "system": [{"type": "text", "text": "Be brief."}]}
    answer = http.post("/v1/messages", json=body).json()
    messages = [{"role": "system", "content": "Be brief."}, *BODY["messages"]]
    chat = http.post(
        "/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 12}
    ).json()
    assert answer["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "tiny")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    usage = answer["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 12
    counted = http.post("/v1/messages/count_tokens", json={**body, "max_tokens": None})
    assert counted.json() == {"input_tokens": usage["input_tokens"]}


def test_stream_has_the_same_text(http: httpx.Client) -> None:
    whole = http.post("/v1/messages", json=BODY).json()
    events = events_of(http.post("/v1/messages", json={**BODY, "stream": True}))
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(deltas) == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 12


def test_stop_sequence_is_told(http: httpx.Client) -> None:
    text = http.post("/v1/messages", json=BODY).json()["content"][0]["text"]
    stop = text[4:6]
    answer = http.post("/v1/messages", json={**BODY, "stop_sequences": [stop]}).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)


@pytest.mark.parametrize(
    "constraint",
    [
        {"guided_choice": ["yes"]},
        {"regex": "yes"},
        {"structured_outputs": {"choice": ["yes"]}},
        {"grammar": 'root ::= "yes"'},
    ],
)
def test_constraints_of_chats_apply(http: httpx.Client, constraint: dict[str, Any]) -> None:
    answer = http.post("/v1/messages", json={**BODY, **constraint}).json()
    assert answer["content"] == [{"type": "text", "text": "yes"}]
    assert answer["stop_reason"] == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools_are_called_and_their_results_are_read(
    tool_server: str, choice: dict[str, Any]
) -> None:
    body = {**BODY, "max_tokens": 300, "tools": [WEATHER]}
    choice = {**choice, "disable_parallel_tool_use": True}
    with httpx.Client(base_url=tool_server, timeout=120) as http:
        answer = http.post("/v1/messages", json={**body, "tool_choice": choice}).json()
        [block] = answer["content"]
        assert (block["type"], block["input"]) == ("tool_use", {"city": "Rome"})
        assert answer["stop_reason"] == "tool_use"
        stream = {**body, "tool_choice": choice, "stream": True}
        events = events_of(http.post("/v1/messages", json=stream))
        parts = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
        assert json.loads("".join(parts)) == {"city": "Rome"}
        result = {"type": "tool_result", "tool_use_id": block["id"], "content": "sunny"}
        history = [
            *BODY["messages"],
            {"role": "assistant", "content": [{"type": "text", "text": "Hm."}, block]},
            {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
        ]
        after = http.post("/v1/messages", json={**BODY, "messages": history, "tools": [WEATHER]})
        assert after.json()["content"][0]["type"] == "text"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 10**6}, "(max_tokens)"),
        ({"regex": "^(?!a)b"}, "regex"),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"model": "other"}, "other"),
    ],
)
def test_errors_have_anthropic_s_form(
    http: httpx.Client, fields: dict[str, Any], message: str
) -> None:
    response = http.post("/v1/messages", json={**BODY, **fields})
    body = response.json()
    assert response.status_code in (400, 404)
    assert body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert message in body["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "size_bytes", "status"),
    [
        pytest.param({"Content-Encoding": "br"}, 2, 415, id="encoding"),
        pytest.param({}, 8 << 20, 413, id="size"),
    ],
)
def test_refusals_before_the_route_have_anthropic_s_form(
    http: httpx.Client, headers: dict[str, str], size_bytes: int, status: int
) -> None:
    response = http.post("/v1/messages", content=b" " * size_bytes, headers=headers)
    assert (response.status_code, response.json()["type"]) == (status, "error")
