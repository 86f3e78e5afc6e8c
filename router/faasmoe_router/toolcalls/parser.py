"""Streaming parser of tool calls in a model's text.

A state machine over the text received so far. Text that is not a call is emitted as content, so
nothing is lost. Once a call's name is known its arguments are emitted verbatim as they arrive.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from faasmoe_router.toolcalls.formats import ToolCallFormat

_CALL_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
MAX_HEAD_LENGTH = 1024  # a call with a longer head is parsed when its object is complete
_WHITESPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The start of a call, emitted once its name is known."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArgumentsDelta:
    """Part of the JSON arguments of a call."""

    index: int
    text: str


ToolCallEvent = ContentDelta | ToolCallStart | ToolCallArgumentsDelta


class _JSONObjectScanner:
    """Finds the end of a JSON object in a stream of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find_end(self, text: str) -> int | None:
        """Scan more text; return the offset in it after the object's end, or None."""
        for offset, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return offset + 1
        return None


_State = Literal["content", "between", "object", "arguments", "object_end", "done"]


class ToolCallParser:
    """Parses the tool calls of one text.

    Args:
        call_format: format of the calls.
        tool_names: names of the tools; in a format without markers only their calls count as calls.
        parallel: whether calls after the first are parsed; otherwise the text after it is dropped.

    Attributes:
        n_calls: number of calls started so far.
    """

    def __init__(
        self, call_format: ToolCallFormat, tool_names: Collection[str], *, parallel: bool = True
    ) -> None:
        self._format = call_format
        self._tool_names = tool_names
        self._parallel = parallel
        self._state: _State = "content" if call_format.start_marker else "between"
        self._buffer = ""  # text not emitted yet
        self._unconfirmed = ""  # marker and separators; content unless a call follows
        self._scanner = _JSONObjectScanner()
        self._n_scanned = 0
        self._has_emitted = False
        self.n_calls = 0

    def feed(self, text: str) -> list[ToolCallEvent]:
        """Parse more text; return the events that it completes."""
        self._buffer += text
        return list(self._parse())

    def flush(self) -> list[ToolCallEvent]:
        """Return the events of the text held back; called at the end of the text."""
        text, self._unconfirmed, self._buffer = self._unconfirmed + self._buffer, "", ""
        if self._state == "arguments":
            return [ToolCallArgumentsDelta(self.n_calls - 1, text)] if text else []
        if self._state in ("object_end", "done") or (self._state == "between" and self.n_calls):
            return []
        return [ContentDelta(text)] if text and (text.strip() or not self.n_calls) else []

    def _parse(self) -> Iterator[ToolCallEvent]:
        previous: tuple[_State, int] | None = None
        while previous != (current := (self._state, len(self._buffer))):
            previous = current
            yield from getattr(self, f"_read_{self._state}")()

    def _read_content(self) -> Iterator[ToolCallEvent]:
        start_marker = self._format.start_marker
        if not start_marker:
            yield from self._emit_content(len(self._buffer))
            return
        start = self._buffer.find(start_marker)
        if start < 0:
            n_held_back = partial_marker_length(self._buffer, start_marker)
            yield from self._emit_content(len(self._buffer) - n_held_back)
            return
        remainder = self._buffer[start + len(start_marker) :]
        yield from self._emit_content(start)
        self._buffer, self._unconfirmed, self._state = remainder, start_marker, "between"

    def _emit_content(self, n_characters: int) -> Iterator[ContentDelta]:
        """Emit the first characters of the buffer as content; holds back leading whitespace."""
        text = self._buffer[:n_characters]
        if text and (self._has_emitted or text.strip()):
            self._has_emitted = True
            self._buffer = self._buffer[n_characters:]
            yield ContentDelta(text)

    def _read_between(self) -> Iterator[ToolCallEvent]:
        text = self._buffer.lstrip(_WHITESPACE + self._format.separators)
        end_marker = self._format.end_marker
        if text.startswith("{"):
            self._unconfirmed += self._buffer[: len(self._buffer) - len(text)]
            self._buffer, self._state = text, "object"
            self._scanner, self._n_scanned = _JSONObjectScanner(), 0
        elif end_marker and text.startswith(end_marker):
            self._buffer, self._unconfirmed = text.removeprefix(end_marker), ""
            self._state, self._has_emitted = "content", False
        elif text and not end_marker.startswith(text):
            yield from self._emit_as_content()

    def _emit_as_content(self) -> Iterator[ToolCallEvent]:
        """Emit a marker or text that no call follows as content and resume after it."""
        content = self._unconfirmed or self._buffer
        self._buffer = self._buffer if self._unconfirmed else ""
        self._unconfirmed, self._state, self._has_emitted = "", "content", True
        yield ContentDelta(content)

    def _read_object(self) -> Iterator[ToolCallEvent]:
        head = _CALL_HEAD.match(self._buffer[:MAX_HEAD_LENGTH])
        name = _parse_string(head[1]) if head else None
        if head and name is not None and (self._format.start_marker or name in self._tool_names):
            yield self._start_call(name)
            self._buffer, self._state = self._buffer[head.end() :], "arguments"
            self._scanner = _JSONObjectScanner()
            return
        object_end = self._scanner.find_end(self._buffer[self._n_scanned :])
        if object_end is None:
            self._n_scanned = len(self._buffer)
            return
        object_end += self._n_scanned
        parsed = _parse_call(self._buffer[:object_end])
        if parsed is None or not (self._format.start_marker or parsed[0] in self._tool_names):
            yield from self._emit_as_content()
            return
        yield self._start_call(parsed[0])
        yield ToolCallArgumentsDelta(self.n_calls - 1, parsed[1])
        self._buffer = self._buffer[object_end:]
        self._finish_call()

    def _start_call(self, name: str) -> ToolCallStart:
        self._unconfirmed = ""
        self.n_calls += 1
        return ToolCallStart(self.n_calls - 1, name)

    def _read_arguments(self) -> Iterator[ToolCallEvent]:
        end = self._scanner.find_end(self._buffer)
        arguments = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(arguments) :]
        if arguments:
            yield ToolCallArgumentsDelta(self.n_calls - 1, arguments)
        if end is not None:
            self._state = "object_end"

    def _read_object_end(self) -> Iterator[ToolCallEvent]:
        """Skip the rest of a call's object after its arguments."""
        _, brace, self._buffer = self._buffer.partition("}")
        if brace:
            self._finish_call()
        yield from ()

    def _finish_call(self) -> None:
        self._state = "between" if self._parallel else "done"

    def _read_done(self) -> Iterator[ToolCallEvent]:
        self._buffer = ""
        yield from ()


def partial_marker_length(text: str, marker: str) -> int:
    """Return the length of the text's longest suffix that is a proper prefix of the marker."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)


def _parse_string(text: str) -> str | None:
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _parse_call(text: str) -> tuple[str, str] | None:
    """Return name and JSON arguments of a call's object; None if it is not a call."""
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = parsed.get("name")
    if not isinstance(name, str):
        return None
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(
        arguments, ensure_ascii=False
    )
