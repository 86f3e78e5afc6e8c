import json
from typing import Any

import pytest

from faasmoe_router.api.errors import ApiError
from faasmoe_router.tenants.service import Caller
from faasmoe_router.vllm_backend.tenant_middleware import (
    parse_body,
    renamed_event,
    system_prompt,
    token_limit,
    tools_with_parameters,
)

CHAT, ANTHROPIC, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CALLER = Caller("acme", model_alias="acme-chat", system_prompt="Be brief.")
USER = {"role": "user", "content": "Hello"}


def rewritten(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    value = parse_body(json.dumps(body).encode(), CALLER, "moe")
    return value | system_prompt(value, path, CALLER)


@pytest.mark.parametrize("name", ["moe", "acme-chat"])
def test_an_alias_stands_for_the_models_name(name: str) -> None:
    assert rewritten({"model": name, "messages": []})["model"] == "moe"


def test_another_models_name_is_refused() -> None:
    with pytest.raises(ApiError, match="`other-tenants-alias` does not exist") as caught:
        rewritten({"model": "other-tenants-alias"})
    assert caught.value.status == 404


def test_a_tenants_system_prompt_is_added_unless_the_request_has_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rewritten({"messages": [USER]})["messages"] == [system, USER]
    own = {"role": "system", "content": "Rhyme."}
    assert rewritten({"messages": [own, USER]})["messages"] == [own, USER]
    assert rewritten({"messages": [USER]}, ANTHROPIC)["system"] == "Be brief."
    assert rewritten({"system": "Rhyme."}, ANTHROPIC)["system"] == "Rhyme."
    assert rewritten({"input": "Hello"}, RESPONSES)["instructions"] == "Be brief."


def test_functions_without_parameters_take_an_empty_object() -> None:
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "name": "f", "parameters": None},
        {"type": "function", "function": "f"},
        {"name": "f", "input_schema": schema},
        "f",
    ]
    assert tools_with_parameters({"tools": tools}) == {
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": empty}},
            tools[1],
            {"type": "function", "name": "f", "parameters": empty},
            *tools[3:],
        ]
    }


@pytest.mark.parametrize("body", [{}, {"tools": None}, {"tools": {}}])
def test_no_tools_are_left_as_they_are(body: dict[str, Any]) -> None:
    assert tools_with_parameters(body) == {}


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b'"x"'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(body, CALLER, "moe")
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_more_tokens_than_a_tenant_may_generate_are_refused(name: str) -> None:
    caller = Caller("acme", max_output_tokens=8)
    assert token_limit({name: 8}, caller) == 8
    assert token_limit({name: None}, caller) is None
    with pytest.raises(ApiError, match=f"^{name} is too large: 9. Your tenant may generate at m"):
        token_limit({name: 9}, caller)


def completed_event(status: str) -> bytes:
    value = {"type": "response.completed", "response": {"status": status, "text": "ü\n\ndata: "}}
    return f"event: response.completed\ndata: {json.dumps(value)}\n\n".encode()


def test_the_last_event_of_a_cut_response_says_that_it_is_incomplete() -> None:
    name, data, *rest = renamed_event(completed_event("incomplete")).decode().split("\n")
    assert name == "event: response.incomplete"
    value = json.loads(data.removeprefix("data: "))
    assert value["type"] == "response.incomplete"
    assert value["response"]["text"] == "ü\n\ndata: "
    assert rest == ["", ""]


@pytest.mark.parametrize("event", [completed_event("completed"), b"data: [DONE]\n\n", b"{}", b""])
def test_other_events_are_passed_on_as_they_are(event: bytes) -> None:
    assert renamed_event(event) == event
