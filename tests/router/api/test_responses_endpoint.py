"""OpenAI's Responses API with the unmodified openai client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
BODY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture
def tools_client(tool_server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{tool_server}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


def test_text_is_that_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.responses.create(**BODY, input="fox", instructions="Be brief.")
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "fox"},
    ]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=12
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete"
    [item] = answer.output
    assert item.type == "message"
    assert item.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == 12
    assert (answer.id[:5], answer.model, answer.instructions) == ("resp_", "tiny", "Be brief.")


def test_stream_has_the_same_text_and_ordered_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(**BODY, input="fox")
    events = list(client.responses.create(**BODY, input="fox", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    with client.responses.stream(**BODY, input="fox") as stream:
        stream.until_done()


def test_tools_are_called_and_their_results_are_read(tools_client: openai.OpenAI) -> None:
    body: Any = {**BODY, "max_output_tokens": 300, "tools": [WEATHER]}
    answer = tools_client.responses.create(
        **body, input="hi", tool_choice="required", parallel_tool_calls=False
    )
    [call] = answer.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert answer.status == "completed"
    history: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": []},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    after = tools_client.responses.create(**{**BODY, "tools": [WEATHER]}, input=history)
    assert after.output_text
    named = tools_client.responses.create(
        **body, input="hi", tool_choice={"type": "function", "name": "weather"}
    )
    assert named.output[0].type == "function_call"


def test_calls_are_streamed(tools_client: openai.OpenAI) -> None:
    events = list(
        tools_client.responses.create(
            **{**BODY, "max_output_tokens": 300},
            tools=[WEATHER],
            input="hi",
            tool_choice="required",
            parallel_tool_calls=False,
            stream=True,
        )
    )
    deltas = [
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    ]
    assert json.loads("".join(deltas)) == {"city": "Rome"}
    last: Any = events[-1]
    assert last.type == "response.completed"
    assert last.response.output[0].arguments == "".join(deltas)


def test_structured_output(client: openai.OpenAI) -> None:
    spec: Any = {
        "type": "json_schema",
        "name": "n",
        "schema": {"const": {"a": 1}},
        "strict": True,
    }
    answer = client.responses.create(
        **{**BODY, "max_output_tokens": 60}, input="x", text={"format": spec}
    )
    assert json.loads(answer.output_text) == {"a": 1}


def test_logprobs_are_those_of_a_chat(client: openai.OpenAI) -> None:
    asked: Any = {**BODY, "input": "fox", "include": ["message.output_text.logprobs"]}
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "fox"}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=3,
    )
    assert chat.choices[0].logprobs is not None
    expected = [
        (e.token, e.logprob, [c.token for c in e.top_logprobs])
        for e in chat.choices[0].logprobs.content or ()
    ]

    def found(entries: Any) -> Any:
        return [(e.token, e.logprob, [c.token for c in e.top_logprobs]) for e in entries]

    whole: Any = client.responses.create(**asked, top_logprobs=3).output[0]
    assert found(whole.content[0].logprobs) == expected
    events = list(client.responses.create(**asked, top_logprobs=3, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry for event in deltas for entry in found(event.logprobs)] == expected
    last: Any = events[-1]
    assert last.response.output[0].content[0].logprobs == whole.content[0].logprobs
    without: Any = client.responses.create(**BODY, input="fox").output[0]
    assert without.content[0].logprobs == []


def test_parameters_of_vllm_apply(http: httpx.Client) -> None:
    def text(path: str, **fields: Any) -> str:
        body = http.post(path, json={"model": "tiny", "seed": 3, **fields}).raise_for_status()
        answer = body.json()
        if "output" in answer:
            return str(answer["output"][0]["content"][0]["text"])
        return str(answer["choices"][0]["message"]["content"])

    messages = [{"role": "user", "content": "fox"}]
    for fields in (
        {"top_k": 2},
        {"repetition_penalty": 2.0},
        {"structured_outputs": {"regex": "a+b"}},
        {"guided_choice": ["yes"]},
        {"ebnf": 'root ::= "yes"'},
        {"logit_bias": {"7": 100}},
    ):
        of_chat = text("/v1/chat/completions", messages=messages, max_tokens=12, **fields)
        assert text("/v1/responses", input="fox", max_output_tokens=12, **fields) == of_chat
    refused = http.post("/v1/responses", json={**BODY, "input": "fox", "top_k": -5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_response_messages": True}, "enable_response_messages"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"regex": "^(?!a)b"}, "regex"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": 5}, "input"),
        ({"input": [{"role": "<king>", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_what_is_not_supported_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/responses", json={**BODY, "input": "x", **fields})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"].startswith(param)
    assert http.post("/v1/responses", json={**BODY, "input": "x", "store": False}).is_success
