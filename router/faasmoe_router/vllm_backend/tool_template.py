"""Chat templates that take no tools, extended for vLLM, which renders tools by the template alone.

What the engine `transformers` writes into the messages (`toolcalls/prompted.py`), the template
writes here. Imports no vLLM.
"""

from __future__ import annotations

import json

from faasmoe_router.toolcalls.formats import HERMES, supports_tools
from faasmoe_router.toolcalls.prompted import INSTRUCTION

_TOOLS = "\0"
_PRELUDE = """\
{%- if tools -%}
{%- set told = namespace(messages=[], tools=[], text='') -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- set told.text = '<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -%}
{%- set told.messages = told.messages + [{'role': 'user', 'content': told.text}] -%}
{%- elif message.tool_calls -%}
{%- set told.text = message.content or '' -%}
{%- for call in message.tool_calls -%}
{%- set told.text = told.text ~ ('\\n' if told.text else '') ~ START ~ '\\n{"name": ' \
~ (call.function.name | tojson) ~ ', "arguments": ' ~ (call.function.arguments | tojson) \
~ '}\\n' ~ END -%}
{%- endfor -%}
{%- set told.messages = told.messages + [{'role': message.role, 'content': told.text}] -%}
{%- else -%}
{%- set told.messages = told.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- for tool in tools -%}
{%- set told.tools = told.tools + [tool.function | tojson] -%}
{%- endfor -%}
{%- set told.text = BEFORE_TOOLS ~ told.tools | join('\\n') ~ AFTER_TOOLS -%}
{%- if told.messages and told.messages[0].role == 'system' -%}
{%- set told.text = told.messages[0].content ~ '\\n\\n' ~ told.text -%}
{%- set told.messages = told.messages[1:] -%}
{%- endif -%}
{%- set messages = [{'role': 'system', 'content': told.text}] + told.messages -%}
{%- endif -%}
"""


def with_tools(chat_template: str) -> str | None:
    """Return a chat template that also takes tools; None for one that does so already.

    Args:
        chat_template: a template that renders the variable `messages`.
    """
    if supports_tools(chat_template):
        return None
    before, after = INSTRUCTION.format(
        tools=_TOOLS, start=HERMES.start_marker, end=HERMES.end_marker
    ).split(_TOOLS)
    texts = {
        "BEFORE_TOOLS": before,
        "AFTER_TOOLS": after,
        "START": HERMES.start_marker,
        "END": HERMES.end_marker,
    }
    prelude = _PRELUDE
    for name, text in texts.items():
        prelude = prelude.replace(name, json.dumps(text))
    return prelude + chat_template
