"""Reading calls of tools out of a text while it comes.

What is not a call comes out as content, so nothing of a text is ever lost. A call's arguments come
out as they are written, piece by piece, once its name is known.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from faasmoe_router.toolcalls.forms import CallForm

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
MAX_HEAD_LENGTH = 1024  # what is longer is read as a whole
_WHITESPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call whose name is known now."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Content | CallBegun | CallArguments


class _Braces:
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


_State = Literal["content", "between", "object", "arguments", "rest", "over"]


class CallParser:
    """Reads one text.

    Args:
        form: how calls are written.
        names: the tools that exist; where calls have no marks, only these are calls.
        many: whether more than the first call is read.
    """

    def __init__(self, form: CallForm, names: Collection[str], *, many: bool = True) -> None:
        self._form = form
        self._names = names
        self._many = many
        self._state: _State = "content" if form.begin else "between"
        self._text = ""  # what was not told yet
        self._opened = ""  # what becomes content after all if no call follows
        self._braces = _Braces()
        self._n_scanned = 0
        self._said = False
        self.n_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Take more text; return what is certain now."""
        self._text += text
        return list(self._steps())

    def flush(self) -> list[Piece]:
        """Return what was held back, at the end of the text."""
        text, self._opened, self._text = self._opened + self._text, "", ""
        if self._state == "arguments":
            return [CallArguments(self.n_calls - 1, text)] if text else []
        if self._state in ("rest", "over") or (self._state == "between" and self.n_calls):
            return []
        return [Content(text)] if text and (text.strip() or not self.n_calls) else []

    def _steps(self) -> Iterator[Piece]:
        before: tuple[_State, int] | None = None
        while before != (now := (self._state, len(self._text))):
            before = now
            yield from getattr(self, f"_read_{self._state}")()

    def _read_content(self) -> Iterator[Piece]:
        begin = self._form.begin
        if not begin:
            yield from self._say(len(self._text))
            return
        at = self._text.find(begin)
        if at < 0:
            yield from self._say(len(self._text) - _held(self._text, begin))
            return
        after = self._text[at + len(begin) :]
        yield from self._say(at)
        self._text, self._opened, self._state = after, begin, "between"

    def _say(self, n_characters: int) -> Iterator[Content]:
        """Tell the beginning of the text as content; blanks wait for something to follow them."""
        text = self._text[:n_characters]
        if text and (self._said or text.strip()):
            self._said = True
            self._text = self._text[n_characters:]
            yield Content(text)

    def _read_between(self) -> Iterator[Piece]:
        text = self._text.lstrip(_WHITESPACE + self._form.between)
        end = self._form.end
        if text.startswith("{"):
            self._opened += self._text[: len(self._text) - len(text)]
            self._text, self._state = text, "object"
            self._braces, self._n_scanned = _Braces(), 0
        elif end and text.startswith(end):
            self._text, self._opened = text.removeprefix(end), ""
            self._state, self._said = "content", False
        elif text and not end.startswith(text):
            yield from self._give_up()

    def _give_up(self) -> Iterator[Piece]:
        """Tell as content what turned out to be no call, and look for the next mark after it."""
        told = self._opened or self._text
        self._text = self._text if self._opened else ""
        self._opened, self._state, self._said = "", "content", True
        yield Content(told)

    def _read_object(self) -> Iterator[Piece]:
        head = _HEAD.match(self._text[:MAX_HEAD_LENGTH])
        name = _string(head[1]) if head else None
        if head and name is not None and (self._form.begin or name in self._names):
            yield self._begin(name)
            self._text, self._state = self._text[head.end() :], "arguments"
            self._braces = _Braces()
            return
        end = self._braces.find_end(self._text[self._n_scanned :])
        if end is None:
            self._n_scanned = len(self._text)
            return
        end += self._n_scanned
        call = _call(self._text[:end])
        if call is None or not (self._form.begin or call[0] in self._names):
            yield from self._give_up()
            return
        yield self._begin(call[0])
        yield CallArguments(self.n_calls - 1, call[1])
        self._text = self._text[end:]
        self._end_call()

    def _begin(self, name: str) -> CallBegun:
        self._opened = ""
        self.n_calls += 1
        return CallBegun(self.n_calls - 1, name)

    def _read_arguments(self) -> Iterator[Piece]:
        end = self._braces.find_end(self._text)
        told = self._text if end is None else self._text[:end]
        self._text = self._text[len(told) :]
        if told:
            yield CallArguments(self.n_calls - 1, told)
        if end is not None:
            self._state = "rest"

    def _read_rest(self) -> Iterator[Piece]:
        """Skip what follows the arguments in a call's object."""
        _, brace, after = self._text.partition("}")
        self._text = after
        if brace:
            self._end_call()
        yield from ()

    def _end_call(self) -> None:
        self._state = "between" if self._many else "over"

    def _read_over(self) -> Iterator[Piece]:
        self._text = ""
        yield from ()


def _held(text: str, mark: str) -> int:
    """Return the length of the longest end of the text that begins the mark."""
    longest = min(len(mark) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


def _string(text: str) -> str | None:
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON, that an object says, if it is a call."""
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = said.get("name")
    if not isinstance(name, str):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(
        arguments, ensure_ascii=False
    )
