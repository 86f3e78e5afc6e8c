from typing import Any

import pytest
from tiny_chat import CHAT_TEMPLATE, tiny_tokenizer

from faasmoe_router.toolcalls.prompted import with_prompted_tools
from faasmoe_router.vllm_backend.tool_template import with_tools

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "größe", "description": "<b>"}},
]
CALLS = [
    {"id": "c", "type": "function", "function": {"name": "clock", "arguments": {"a": "ü<"}}},
    {"id": "d", "type": "function", "function": {"name": "größe", "arguments": {}}},
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "hi"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "calls": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hm.", "tool_calls": CALLS},
        {"role": "tool", "content": "12:00", "tool_call_id": "c"},
        {"role": "assistant", "content": "", "tool_calls": CALLS[:1]},
    ],
}


def render(messages: list[dict[str, Any]], template: str | None, **options: Any) -> str:
    return str(
        tiny_tokenizer().apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
    )


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_tools_are_rendered_as_the_engine_transformers_writes_them(
    messages: list[dict[str, Any]],
) -> None:
    expected = render(with_prompted_tools(messages, TOOLS), CHAT_TEMPLATE)
    assert render(messages, with_tools(CHAT_TEMPLATE), tools=TOOLS) == expected


def test_chats_without_tools_are_rendered_as_before() -> None:
    messages = CHATS["system"]
    assert render(messages, with_tools(CHAT_TEMPLATE)) == render(messages, CHAT_TEMPLATE)


def test_a_template_that_takes_tools_is_left_alone() -> None:
    assert with_tools("{{ messages }}{{ tools }}") is None
