from typing import Any

from faasmoe_router.toolcalls.prompted import with_prompted_tools

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def test_tools_are_written_into_a_system_message() -> None:
    [system, user] = with_prompted_tools([{"role": "user", "content": "hi"}], TOOLS)
    assert system["role"] == "system"
    assert '{"name": "clock", "parameters": {}}' in system["content"]
    assert "<tool_call>" in system["content"]
    assert user == {"role": "user", "content": "hi"}


def test_an_existing_system_message_is_kept() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    [system, _] = with_prompted_tools(messages, TOOLS)
    assert system["content"].startswith("Be brief.\n\nYou may call functions.")


def test_calls_and_results_are_written_as_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": {"a": "ü"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "c"},
    ]
    *_, assistant, result = with_prompted_tools(messages, TOOLS)
    assert assistant["content"] == (
        'Hm.\n<tool_call>\n{"name": "clock", "arguments": {"a": "ü"}}\n</tool_call>'
    )
    assert "tool_calls" not in assistant
    assert result == {"role": "user", "content": "<tool_response>\n12:00\n</tool_response>"}
