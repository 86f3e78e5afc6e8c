"""Tool calling for chat templates that take no tools: everything is written into the messages.

The tools and the form of a call are a system message, earlier calls are written as the model is
told to write them, and results of tools are messages of the user. The form is Hermes', which many
models have seen.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_router.toolcalls.formats import HERMES

INSTRUCTION = """\
You may call functions. They are, one JSON object per line:
{tools}
To call a function, write only this, with the function's name and arguments as JSON:
{start}
{{"name": NAME, "arguments": {{...}}}}
{end}
Results follow in <tool_response>. If no function helps, answer without a call."""


def with_prompted_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the messages of a chat with tools for a template that knows no tools."""
    instruction = INSTRUCTION.format(
        tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        start=HERMES.start_marker,
        end=HERMES.end_marker,
    )
    written = [_without_calls(message) for message in messages]
    if written and written[0]["role"] == "system":
        first = {**written[0], "content": f"{written[0]['content']}\n\n{instruction}".strip()}
        return [first, *written[1:]]
    return [{"role": "system", "content": instruction}, *written]


def _without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without what such a template does not know."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = [_written_call(call["function"]) for call in message.get("tool_calls", ())]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [message["content"], *calls]))}


def _written_call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    text = json.dumps(call, ensure_ascii=False)
    return f"{HERMES.start_marker}\n{text}\n{HERMES.end_marker}"
