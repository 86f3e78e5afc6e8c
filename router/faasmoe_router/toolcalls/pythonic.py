"""Tool calls written as a Python list of calls, as Llama 4 writes them.

`[weather(city="Rome", days=3), clock()]`, with or without `<|python_start|>` and `<|python_end|>`
around it. A text consists of such a list or has no calls at all. Calls are emitted when the list is
complete, and only if every one is of a known tool and has literal arguments by name.
"""

import ast
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from faasmoe_router.toolcalls.parser import (
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallEvent,
    ToolCallStart,
)

TEMPLATE_MARK = "[func_name1("
_START_MARKER, _END_MARKER = "<|python_start|>", "<|python_end|>"
_LIST_START = re.compile(r"\[\s*[\w-]+\(")
_LIST_START_PREFIX = re.compile(r"\[\s*[\w-]*")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def is_pythonic(chat_template: str) -> bool:
    """Return whether a chat template tells the model to write calls as a Python list."""
    return TEMPLATE_MARK in chat_template


class PythonicToolCallParser:
    """Parses the tool calls of one text.

    Args:
        tool_names: names of the tools.
        parallel: whether calls after the first are parsed; otherwise they are dropped.

    Attributes:
        n_calls: number of calls started so far.
    """

    def __init__(self, tool_names: Collection[str], *, parallel: bool = True) -> None:
        self._tool_names = tool_names
        self._parallel = parallel
        self._buffer = ""
        self._is_content = False
        self.n_calls = 0

    def feed(self, text: str) -> list[ToolCallEvent]:
        """Parse more text; return the content in it, unless the text may be a list of calls."""
        if self._is_content:
            return [ContentDelta(text)] if text else []
        self._buffer += text
        if _may_be_calls(self._buffer):
            return []
        self._is_content = True
        return self._take_content()

    def flush(self) -> list[ToolCallEvent]:
        """Return the calls, or the text if it is none; called at the end of the text."""
        text = self._buffer.strip().removeprefix(_START_MARKER).removesuffix(_END_MARKER).strip()
        calls = None if self._is_content else parse_pythonic_calls(text, self._tool_names)
        if not calls:
            return self._take_content()
        self._buffer = ""
        events: list[ToolCallEvent] = []
        for name, arguments in calls if self._parallel else calls[:1]:
            events.append(ToolCallStart(self.n_calls, name))
            events.append(ToolCallArgumentsDelta(self.n_calls, arguments))
            self.n_calls += 1
        return events

    def _take_content(self) -> list[ToolCallEvent]:
        text, self._buffer = self._buffer, ""
        return [ContentDelta(text)] if text else []


def _may_be_calls(text: str) -> bool:
    text = text.lstrip()
    if _START_MARKER.startswith(text):
        return True
    text = text.removeprefix(_START_MARKER).lstrip()
    if not text:
        return True
    return bool(_LIST_START.match(text) or _LIST_START_PREFIX.fullmatch(text))


def parse_pythonic_calls(text: str, tool_names: Collection[str]) -> list[tuple[str, str]] | None:
    """Return name and JSON arguments of each call in a list; None if it is not such a list.

    Args:
        text: the list.
        tool_names: names of the tools; they may have dashes, which names in Python may not.
    """
    aliases = {
        f"_tool_{index}_": name
        for index, name in enumerate(sorted(tool_names))
        if not name.isidentifier()
    }
    for alias, name in aliases.items():
        text = text.replace(f"{name}(", f"{alias}(")
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        calls = [_parse_call(call, aliases) for call in tree.elts]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return calls if all(name in tool_names for name, _ in calls) else None


def _parse_call(call: ast.expr, aliases: Mapping[str, str]) -> tuple[str, str]:
    """Return name and JSON arguments of one call; raises ValueError if it is not one."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError("expected a call whose arguments have names")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("expected arguments with names")
        arguments[keyword.arg] = _value(keyword.value, aliases)
    name = aliases.get(call.func.id, call.func.id)
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _value(node: ast.expr, aliases: Mapping[str, str]) -> Any:
    """Return the value of a literal, in which JSON's true, false and null are known as well."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element, aliases) for element in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("expected a literal")
        keys = [_value(key, aliases) for key in node.keys if key is not None]
        values = [_value(value, aliases) for value in node.values]
        return {str(key): value for key, value in zip(keys, values, strict=True)}
    value = ast.literal_eval(node)
    if isinstance(value, str):
        for alias, name in aliases.items():
            value = value.replace(f"{alias}(", f"{name}(")
    return value
