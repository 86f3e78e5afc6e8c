"""Reasoning and tool calls in the forms of model families, through the API."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

ServeTemplate = Callable[[str], str]

USER = [{"role": "user", "content": "the quick brown fox"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 12}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
OPEN = MESSAGES + "<|im_start|>assistant\n<think>\n{# </think> #}"
CLOSED = MESSAGES + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
CODER = "{% if tools %}{{ tools | tojson }}<tool_call><function=x>{% endif %}" + MESSAGES
PYTHONIC = "{% if tools %}Write [func_name1(params_name1=params_value1)]{% endif %}" + MESSAGES
CODER_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
    "</tool_call>"
)


def post(url: str, **fields: Any) -> Any:
    response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **fields}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def stream(url: str, **fields: Any) -> list[Any]:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, **fields}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return [json.loads(line[6:]) for line in response.text.splitlines() if "{" in line]


def joined(events: list[Any], field: str) -> str:
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


def test_text_after_an_opened_mark_is_reasoning(serve_template: ServeTemplate) -> None:
    url = serve_template(OPEN)
    answer = post(url)
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning"] == message["reasoning_content"] != ""
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
    events = stream(url)
    assert joined(events, "reasoning").strip() == message["reasoning"].strip()
    assert joined(events, "reasoning_content") == joined(events, "reasoning")
    assert joined(events, "content") == ""
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12


def test_reasoning_is_left_out_on_request(serve_template: ServeTemplate) -> None:
    url = serve_template(OPEN)
    message = post(url, include_reasoning=False)["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning" not in message
    assert joined(stream(url, include_reasoning=False), "reasoning") == ""


def test_effort_none_turns_reasoning_off(serve_template: ServeTemplate) -> None:
    thinking = MESSAGES + "<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"
    url = serve_template(thinking)
    assert post(url)["choices"][0]["message"]["content"] is None
    assert post(url, reasoning_effort="none")["choices"][0]["message"]["content"]
    assert post(serve_template(MESSAGES), reasoning_effort="none") is not None
    body = {**CHAT, "reasoning_effort": "none"}
    refused = httpx.post(f"{serve_template(OPEN)}/v1/chat/completions", json=body, timeout=120)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")


def test_text_after_a_closed_mark_is_content(serve_template: ServeTemplate) -> None:
    answer = post(serve_template(CLOSED))
    message = answer["choices"][0]["message"]
    assert message["content"]
    assert "reasoning" not in message
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_text_is_constrained_at_once_where_marks_are_no_tokens(
    serve_template: ServeTemplate,
) -> None:
    message = post(serve_template(OPEN), structured_outputs={"choice": ["yes"]})
    assert message["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize("text", [CODER_CALL, f"Let me see.\n{CODER_CALL}"])
def test_calls_in_blocks_are_parsed(serve_template: ServeTemplate, text: str) -> None:
    url = serve_template(CODER)
    forced = {"structured_outputs": {"choice": [text]}, "tools": [WEATHER], "max_tokens": 300}
    choice = post(url, **forced)["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == (None if text == CODER_CALL else "Let me see.")
    deltas = [
        delta
        for event in stream(url, **forced)
        for c in event["choices"]
        for delta in c["delta"].get("tool_calls", ())
    ]
    assert deltas[0]["function"]["name"] == "weather"
    assert "".join(d["function"]["arguments"] for d in deltas) == '{"city": "Rome"}'


@pytest.mark.parametrize("text", ['[weather(city="Rome"), weather(city="Oslo")]', "[1, 2]"])
def test_calls_as_a_python_list_are_parsed(serve_template: ServeTemplate, text: str) -> None:
    forced = {"structured_outputs": {"choice": [text]}, "tools": [WEATHER], "max_tokens": 300}
    url = serve_template(PYTHONIC)
    message = post(url, **forced)["choices"][0]["message"]
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    if text == "[1, 2]":
        assert (message["content"], calls) == (text, [])
        assert joined(stream(url, **forced), "content") == text
    else:
        assert (message["content"], calls) == (None, ['{"city": "Rome"}', '{"city": "Oslo"}'])


@pytest.mark.parametrize("template", [CODER, PYTHONIC, MESSAGES])
def test_calls_are_enforced_whatever_the_template(
    serve_template: ServeTemplate, template: str
) -> None:
    city = {"city": {"enum": ["Rome"]}}
    schema = {"type": "object", "properties": city, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    named = {"type": "function", "function": {"name": "weather"}}
    strict = {**schema, "additionalProperties": False}
    tool["function"]["parameters"] = strict  # type: ignore[index]
    for choice in ("required", named):
        answer = post(
            serve_template(template),
            tools=[tool],
            tool_choice=choice,
            max_tokens=300,
            parallel_tool_calls=False,
        )
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}


def test_template_without_tools_is_told_of_them_in_messages(serve_template: ServeTemplate) -> None:
    url = serve_template(MESSAGES)
    plain = post(url)["usage"]["prompt_tokens"]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    answer = post(url, tools=[WEATHER], structured_outputs={"choice": [call]}, max_tokens=300)
    [made] = answer["choices"][0]["message"]["tool_calls"]
    assert made["function"]["name"] == "weather"
    assert answer["usage"]["prompt_tokens"] > plain + 50
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": made["id"], "content": "sunny"},
    ]
    assert post(url, messages=history, tools=[WEATHER])["choices"][0]["message"]["content"]


def test_reasoning_of_responses_is_within_a_content_part(serve_template: ServeTemplate) -> None:
    body = {"input": "fox", "temperature": 0, "max_output_tokens": 12, "stream": True}
    response = httpx.post(f"{serve_template(OPEN)}/v1/responses", json=body, timeout=120)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if "data: {" in line]
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done"),
        *("output_item.done", "incomplete"),
    ]
    [item] = events[-1]["response"]["output"]
    deltas = [event["delta"] for event in events if event["type"].endswith("reasoning_text.delta")]
    [part] = item["content"]
    assert part == {"type": "reasoning_text", "text": "".join(deltas)}
