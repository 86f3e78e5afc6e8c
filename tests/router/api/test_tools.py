"""Tools beyond plain functions: custom and allowed tools, and schemas that no grammar enforces."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

USER: list[Any] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 300}
CITY = {"city": {"enum": ["Rome", "Oslo"]}}
CUSTOM: Any = {"type": "custom", "custom": {"name": "shell", "description": "Runs a command."}}


def function(name: str, properties: Any = None, **fields: Any) -> Any:
    schema = {
        "type": "object",
        "properties": properties or {},
        "required": list(properties or {}),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, **fields}}


@pytest.fixture
def tools_client(tool_server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{tool_server}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


def forced(call: dict[str, Any]) -> dict[str, Any]:
    text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return {"structured_outputs": {"choice": [text]}}


def test_custom_tool_is_called_with_its_input(tools_client: openai.OpenAI) -> None:
    call = {"name": "shell", "arguments": {"input": 'echo "ü" \\ done'}}
    answer = tools_client.chat.completions.create(**CHAT, tools=[CUSTOM], extra_body=forced(call))
    [made] = answer.choices[0].message.tool_calls or []
    assert made.type == "custom"
    assert (made.custom.name, made.custom.input) == ("shell", 'echo "ü" \\ done')


def test_custom_tool_is_streamed(tool_server: str) -> None:
    call = {"name": "shell", "arguments": {"input": "ls"}}
    body = {**CHAT, "tools": [CUSTOM], "stream": True, **forced(call)}
    response = httpx.post(f"{tool_server}/v1/chat/completions", json=body, timeout=120)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if "{" in line]
    deltas = [e["choices"][0]["delta"].get("tool_calls") for e in events]
    [first], *rest = [delta for delta in deltas if delta]
    assert (first["index"], first["type"]) == (0, "custom")
    assert first["custom"] == {"name": "shell", "input": ""}
    assert [delta["custom"]["input"] for [delta] in rest] == ["ls"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_custom_tool_can_be_required(tools_client: openai.OpenAI) -> None:
    choice: Any = {"type": "custom", "custom": {"name": "shell"}}
    answer = tools_client.chat.completions.create(
        **CHAT,
        tools=[CUSTOM, function("f")],
        tool_choice=choice,
        extra_body={"bad_words": ["\\"]},
    )
    [made] = answer.choices[0].message.tool_calls or []
    assert made.type == "custom"


def test_earlier_call_of_a_custom_tool_is_history(tools_client: openai.OpenAI) -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "shell", "input": "ls"}}
    messages: Any = [
        *USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "README"},
    ]
    answer = tools_client.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": 2})
    assert answer.choices[0].finish_reason == "length"


def test_grammar_of_a_custom_tool_is_refused_by_name(tools_client: openai.OpenAI) -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a"}}
    tool: Any = {"type": "custom", "custom": {"name": "shell", "format": grammar}}
    with pytest.raises(openai.BadRequestError, match=r"custom\.format"):
        tools_client.chat.completions.create(**CHAT, tools=[tool])


def allowed(mode: str, *names: str) -> Any:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_allowed_tools_are_called(tools_client: openai.OpenAI) -> None:
    tools = [function("weather", CITY), function("clock"), function("stop")]
    for name in ("clock", "weather"):
        answer = tools_client.chat.completions.create(
            **CHAT, tools=tools, tool_choice=allowed("required", name), parallel_tool_calls=False
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == name


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(allowed("required", "other"), id="unknown"),
        pytest.param(allowed("sometimes", "clock"), id="mode"),
        pytest.param({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, id="no-tools"),
        pytest.param({"type": "allowed_tools"}, id="empty"),
    ],
)
def test_invalid_allowed_tools_are_named(tools_client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tools_client.chat.completions.create(**CHAT, tools=[function("clock")], tool_choice=choice)
    assert (refused.value.param, refused.value.code) == ("tool_choice", "invalid_value")


UNENFORCEABLE = {
    "unique": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "maxItems": 2},
    "format": {"type": "string", "format": "gtin", "maxLength": 3},
    "lookahead": {"type": "string", "pattern": "^(?!a)b*$", "maxLength": 3},
    "overlapping": {
        "type": "object",
        "patternProperties": {"^a": {"const": 1}, "b$": {"const": 2}},
        "maxProperties": 1,
    },
}


@pytest.mark.parametrize("name", UNENFORCEABLE)
def test_schema_that_cannot_be_enforced_is_relaxed_with_a_note(
    tools_client: openai.OpenAI, name: str
) -> None:
    tools = [function("f", {"pattern": UNENFORCEABLE[name], "city": CITY["city"]})]
    response = tools_client.chat.completions.with_raw_response.create(
        **{**CHAT, "max_tokens": 600},
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=3,
    )
    note = response.headers["x-faasmoe-warning"]
    assert note.startswith("tool f: its schema is not enforced in full: ")
    choice = response.parse().choices[0]
    assert choice.finish_reason in ("tool_calls", "length")
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "f"


@pytest.mark.parametrize("name", UNENFORCEABLE)
def test_strict_schema_that_cannot_be_enforced_is_refused(
    tools_client: openai.OpenAI, name: str
) -> None:
    tools = [function("f", {"x": UNENFORCEABLE[name]}, strict=True)]
    with pytest.raises(openai.BadRequestError) as refused:
        tools_client.chat.completions.create(**CHAT, tools=tools, tool_choice="required")
    assert refused.value.param == "tools"


def test_enforceable_schema_has_no_note(tools_client: openai.OpenAI) -> None:
    response = tools_client.chat.completions.with_raw_response.create(
        **CHAT, tools=[function("weather", CITY)], tool_choice="required"
    )
    assert "x-faasmoe-warning" not in response.headers


def test_response_format_is_lenient_only_if_it_says_so(tools_client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 1}
    for strict, is_accepted in ((False, True), (None, False), (True, False)):
        spec = {"name": "n", "schema": schema, "strict": strict}
        body: Any = {**CHAT, "response_format": {"type": "json_schema", "json_schema": spec}}
        if is_accepted:
            answer = tools_client.chat.completions.create(**body)
            assert json.loads(answer.choices[0].message.content or "") in ([], [1])
            continue
        with pytest.raises(openai.BadRequestError, match="uniqueItems"):
            tools_client.chat.completions.create(**body)


def test_refused_regex_says_why_in_full(tools_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tools_client.chat.completions.create(**CHAT, extra_body={"regex": "^(?!a)b"})
    assert refused.value.param == "regex"
    assert "look-around" in refused.value.message


@pytest.mark.parametrize(
    ("param", "value", "text"),
    [
        pytest.param("regex", "yes", "yes", id="sglang-regex"),
        pytest.param("ebnf", 'root ::= "yes"', "yes", id="sglang-ebnf"),
        pytest.param("grammar", 'root ::= "yes"', "yes", id="llama-cpp-grammar"),
        pytest.param("json_schema", {"const": "yes"}, '"yes"', id="llama-cpp-json-schema"),
        pytest.param("json_schema", '{"const": "yes"}', '"yes"', id="sglang-json-schema"),
    ],
)
def test_constraints_of_peers_are_honoured(
    tools_client: openai.OpenAI, param: str, value: Any, text: str
) -> None:
    answer = tools_client.chat.completions.create(**CHAT, extra_body={param: value})
    assert answer.choices[0].message.content == text
    two = {param: value, "guided_regex": "x"}
    with pytest.raises(openai.BadRequestError) as refused:
        tools_client.chat.completions.create(**CHAT, extra_body=two)
    assert refused.value.param == param
