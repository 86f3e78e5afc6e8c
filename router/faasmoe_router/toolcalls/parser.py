"""Reading calls of tools out of a text while it comes.

What is not a call comes out as content, so nothing of a text is ever lost. A call's arguments come
out as they are written, piece by piece, once its name is known.
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
MAX_HEAD_LENGTH = 1024  # what is longer is read as a whole
_WHITESPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call whose name is known now."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArgumentsDelta:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


ToolCallEvent = ContentDelta | ToolCallStart | ToolCallArgumentsDelta


class _JSONObjectScanner:
    """Finds the end of a JSON object in pieces of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find_end(self, text: str) -> int | None:
        """Take more text; return where in it the object is complete, if it is."""
        for at, character in enumerate(text):
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
                    return at + 1
        return None


_State = Literal["content", "between", "object", "arguments", "object_end", "done"]


class ToolCallParser:
    """Reads one text.

    Args:
        form: how calls are written.
        names: the tools that exist; where calls have no marks, only these are calls.
        many: whether more than the first call is read.
    """

    def __init__(
        self, call_format: ToolCallFormat, tool_names: Collection[str], *, parallel: bool = True
    ) -> None:
        self._format = call_format
        self._tool_names = tool_names
        self._parallel = parallel
        self._state: _State = "content" if call_format.start_marker else "between"
        self._buffer = ""  # what was not told yet
        self._unconfirmed = ""  # what becomes content after all if no call follows
        self._scanner = _JSONObjectScanner()
        self._n_scanned = 0
        self._has_emitted = False
        self.n_calls = 0

    def feed(self, text: str) -> list[ToolCallEvent]:
        """Take more text; return what is certain now."""
        self._buffer += text
        return list(self._parse())

    def flush(self) -> list[ToolCallEvent]:
        """Return what was held back, at the end of the text."""
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
        at = self._buffer.find(start_marker)
        if at < 0:
            yield from self._emit_content(
                len(self._buffer) - _partial_marker_length(self._buffer, start_marker)
            )
            return
        after = self._buffer[at + len(start_marker) :]
        yield from self._emit_content(at)
        self._buffer, self._unconfirmed, self._state = after, start_marker, "between"

    def _emit_content(self, n_characters: int) -> Iterator[ContentDelta]:
        """Tell the beginning of the text as content; blanks wait for something to follow them."""
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
        """Tell as content what turned out to be no call, and look for the next mark after it."""
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
        """Skip what follows the arguments in a call's object."""
        _, brace, after = self._buffer.partition("}")
        self._buffer = after
        if brace:
            self._finish_call()
        yield from ()

    def _finish_call(self) -> None:
        self._state = "between" if self._parallel else "done"

    def _read_done(self) -> Iterator[ToolCallEvent]:
        self._buffer = ""
        yield from ()


def _partial_marker_length(text: str, marker: str) -> int:
    """Return the length of the longest end of the text that begins the mark."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)


def _parse_string(text: str) -> str | None:
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _parse_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON, that an object says, if it is a call."""
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
