"""Tool calls that are not JSON objects with a name: formats as data, and one streaming parser.

A format is a marker that starts a block of calls, a pattern of one call within it, and, where
arguments are written one by one, a pattern of one argument. A call is emitted when it is complete.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_router.toolcalls.parser import (
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallEvent,
    ToolCallStart,
    partial_marker_length,
)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a model writes tool calls in a block.

    Attributes:
        name: name of the format.
        template_mark: text by which a chat template of this format is recognised.
        start_marker: text before the calls.
        end_marker: text after them; empty if they end with the text.
        call_end: text at the end of each call; empty if a call ends with its JSON arguments.
        call: pattern of a call, with the groups `name` and `arguments`.
        argument: pattern of one argument in `arguments`, with the groups `key` and `value`; None
            if `arguments` is JSON.
        call_id_length: length in characters of the call ids that the chat template accepts.
    """

    name: str
    template_mark: str
    start_marker: str
    end_marker: str
    call_end: str
    call: re.Pattern[str]
    argument: re.Pattern[str] | None = None
    call_id_length: int = 24


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.DOTALL)


_DEEPSEEK_START = "<｜tool▁calls▁begin｜>"
_DEEPSEEK_END = "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL_END = "<｜tool▁call▁end｜>"
# The first whose mark is in the chat template applies.
BLOCK_FORMATS = (
    BlockFormat(
        name="minimax",
        template_mark="<minimax:tool_call>",
        start_marker="<minimax:tool_call>",
        end_marker="</minimax:tool_call>",
        call_end="</invoke>",
        call=_pattern(r'<invoke name="?(?P<name>[^">]+)"?>(?P<arguments>.*?)</invoke>'),
        argument=_pattern(r'<parameter name="?(?P<key>[^">]+)"?>(?P<value>.*?)</parameter>'),
    ),
    BlockFormat(
        name="qwen3-coder",
        template_mark="<function=",
        start_marker="<tool_call>",
        end_marker="</tool_call>",
        call_end="</function>",
        call=_pattern(r"<function=(?P<name>[^>\n]+)>(?P<arguments>.*?)</function>"),
        argument=_pattern(r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>"),
    ),
    BlockFormat(
        name="glm",
        template_mark="<arg_key>",
        start_marker="<tool_call>",
        end_marker="",
        call_end="</tool_call>",
        call=_pattern(
            r"(?:<tool_call>)?\s*(?P<name>[A-Za-z0-9_.-]+)\s*"
            r"(?P<arguments>(?:<arg_key>.*?)?)</tool_call>"
        ),
        argument=_pattern(
            r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
        ),
    ),
    BlockFormat(
        name="deepseek-v3",
        template_mark="```json",
        call=_pattern(
            r"<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(?P<name>[^\n]+)\n"
            r"```json\n(?P<arguments>.*?)\n?```\s*<｜tool▁call▁end｜>"
        ),
        start_marker=_DEEPSEEK_START,
        end_marker=_DEEPSEEK_END,
        call_end=_DEEPSEEK_CALL_END,
    ),
    BlockFormat(
        name="deepseek-v3.1",
        template_mark="<｜tool▁sep｜>",
        call=_pattern(
            r"<｜tool▁call▁begin｜>(?P<name>.*?)<｜tool▁sep｜>(?P<arguments>.*?)<｜tool▁call▁end｜>"
        ),
        start_marker=_DEEPSEEK_START,
        end_marker=_DEEPSEEK_END,
        call_end=_DEEPSEEK_CALL_END,
    ),
    BlockFormat(
        name="kimi-k2",
        template_mark="<|tool_call_argument_begin|>",
        start_marker="<|tool_calls_section_begin|>",
        end_marker="<|tool_calls_section_end|>",
        call_end="<|tool_call_end|>",
        call=_pattern(
            r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[A-Za-z0-9_-]+)(?::\d+)?\s*"
            r"<\|tool_call_argument_begin\|>(?P<arguments>.*?)<\|tool_call_end\|>"
        ),
    ),
    BlockFormat(
        name="mistral-args",
        template_mark="[ARGS]",
        start_marker="[TOOL_CALLS]",
        end_marker="",
        call_end="",
        call=_pattern(
            r"\s*(?:\[TOOL_CALLS\])?(?P<name>[A-Za-z0-9_-]+)(?:\[CALL_ID\][A-Za-z0-9]+)?\[ARGS\]"
            r"(?P<arguments>.*?)(?=\[TOOL_CALLS\]|$)"
        ),
        call_id_length=9,
    ),
)


def detect_block_format(chat_template: str) -> BlockFormat | None:
    """Return the block format of a chat template; None if it has none of them."""
    for block_format in BLOCK_FORMATS:
        is_deepseek = block_format.start_marker == _DEEPSEEK_START
        if is_deepseek and _DEEPSEEK_START not in chat_template:
            continue
        if block_format.template_mark in chat_template:
            return block_format
    return None


class BlockToolCallParser:
    """Parses the tool calls of one text.

    Args:
        block_format: format of the calls.
        schemas: JSON schemas of the tools' arguments, by name; they say which values are texts.
        parallel: whether calls after the first are parsed; otherwise they are dropped.

    Attributes:
        n_calls: number of calls started so far.
    """

    def __init__(
        self,
        block_format: BlockFormat,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        parallel: bool = True,
    ) -> None:
        self._format = block_format
        self._schemas = schemas
        self._parallel = parallel
        self._buffer = ""
        self._is_block = False
        self._has_emitted = False
        self.n_calls = 0

    def feed(self, text: str) -> list[ToolCallEvent]:
        """Parse more text; return the events that it completes."""
        self._buffer += text
        return list(self._parse())

    def flush(self) -> list[ToolCallEvent]:
        """Return the events of the text held back; called at the end of the text.

        What is left of a block is a call that was cut short: its text is content unless other
        calls precede it.
        """
        events = list(self._read_calls()) if self._is_block else []
        text, self._buffer = self._buffer, ""
        if self._is_block and (self.n_calls or not text.strip()):
            return events
        prefix = self._format.start_marker if self._is_block else ""
        return [*events, *([ContentDelta(prefix + text)] if text else [])]

    def _parse(self) -> Iterator[ToolCallEvent]:
        while True:
            if not self._is_block:
                yield from self._read_content()
                if not self._is_block:
                    return
            if not self._format.call_end:
                return  # calls end with the text
            yield from self._read_calls()
            end_marker = self._format.end_marker
            text = self._buffer.lstrip()
            if not end_marker or not text.startswith(end_marker):
                return
            self._buffer, self._is_block = text.removeprefix(end_marker).lstrip("\n"), False

    def _read_content(self) -> Iterator[ContentDelta]:
        start_marker = self._format.start_marker
        start = self._buffer.find(start_marker)
        if start >= 0:
            yield from self._take_content(len(self._buffer[:start].rstrip("\n")))
            self._buffer = self._buffer.lstrip("\n").removeprefix(start_marker)
            self._is_block = True
            return
        held = partial_marker_length(self._buffer, start_marker)
        free = self._buffer[: len(self._buffer) - held]
        # Line breaks before a call are not content.
        yield from self._take_content(len(free.rstrip("\n")))

    def _take_content(self, n_characters: int) -> Iterator[ContentDelta]:
        text, self._buffer = self._buffer[:n_characters], self._buffer[n_characters:]
        if text and (self._has_emitted or not self.n_calls or text.strip()):
            self._has_emitted = True
            yield ContentDelta(text)

    def _read_calls(self) -> Iterator[ToolCallEvent]:
        while not self._format.call_end or self._format.call_end in self._buffer:
            match = self._format.call.search(self._buffer)
            if match is None:
                return
            self._buffer = self._buffer[match.end() :]
            if self.n_calls and not self._parallel:
                continue
            name = match["name"].strip()
            self.n_calls += 1
            yield ToolCallStart(self.n_calls - 1, name)
            yield ToolCallArgumentsDelta(self.n_calls - 1, self._arguments(name, match))

    def _arguments(self, name: str, match: re.Match[str]) -> str:
        text = match["arguments"]
        if self._format.argument is None:
            return text.strip() or "{}"
        properties = self._schemas.get(name, {}).get("properties", {})
        arguments = {
            m["key"].strip(): _argument_value(m["value"], properties.get(m["key"].strip()))
            for m in self._format.argument.finditer(text)
        }
        return json.dumps(arguments, ensure_ascii=False)


def _argument_value(text: str, schema: Any) -> Any:
    """Return the value of an argument that is written as text.

    A text stays as it is if the schema says string; anything else is JSON if it can be read so, or
    a Python literal, which some models write.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text.strip())
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value
