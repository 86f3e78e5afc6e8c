"""Streaming parser of harmony, the format of GPT-OSS: messages in channels, and calls.

A message is `<|channel|>CHANNEL to=RECIPIENT<|message|>TEXT`, up to `<|end|>`, `<|call|>` or
`<|return|>`. The channel `analysis` is reasoning; a recipient `functions.NAME` is a call of a tool.
"""

import re
from collections.abc import Iterator

from faasmoe_router.toolcalls.parser import (
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallEvent,
    ToolCallStart,
    partial_marker_length,
)
from faasmoe_router.toolcalls.reasoning import ReasoningDelta

CHANNEL_MARKER = "<|channel|>"
_MESSAGE_MARKER = "<|message|>"
_END_MARKERS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_-]+)")
_SPECIAL = re.compile(r"<\|[a-z]+\|>")


class HarmonyParser:
    """Parses the messages of one text.

    Args:
        parallel: whether calls after the first are parsed; otherwise they are dropped.

    Attributes:
        n_calls: number of calls started so far.
        is_reasoning: whether the text so far ends in the channel `analysis`.
    """

    def __init__(self, *, parallel: bool = True) -> None:
        self._parallel = parallel
        self._buffer = ""
        self._is_header = True
        self._has_message = False
        self._is_call = False
        self._is_dropped = False
        self.is_reasoning = False
        self.n_calls = 0

    def feed(self, text: str) -> list[ReasoningDelta | ToolCallEvent]:
        """Parse more text; return the events that it completes."""
        self._buffer += text
        return list(self._parse())

    def flush(self) -> list[ReasoningDelta | ToolCallEvent]:
        """Return the events of the text held back; called at the end of the text.

        A text without a single header is content: a grammar or a template may lead to it.
        """
        text, self._buffer = self._buffer, ""
        if self._is_header and (self._has_message or CHANNEL_MARKER in text):
            return []
        return list(self._emit(_SPECIAL.sub("", text)))

    def _parse(self) -> Iterator[ReasoningDelta | ToolCallEvent]:
        while True:
            if self._is_header:
                header, marker, rest = self._buffer.partition(_MESSAGE_MARKER)
                if not marker:
                    return
                self._buffer = rest
                yield from self._start_message(header)
            ends = [(at, m) for m in _END_MARKERS if (at := self._buffer.find(m)) >= 0]
            if not ends:
                held = max(partial_marker_length(self._buffer, m) for m in _END_MARKERS)
                n_free = len(self._buffer) - held
                text, self._buffer = self._buffer[:n_free], self._buffer[n_free:]
                yield from self._emit(text)
                return
            end, marker = min(ends)
            text, self._buffer = self._buffer[:end], self._buffer[end + len(marker) :]
            yield from self._emit(text)
            self._is_header, self.is_reasoning = True, False

    def _start_message(self, header: str) -> Iterator[ToolCallStart]:
        recipient = _RECIPIENT.search(header)
        channel = header.rpartition(CHANNEL_MARKER)[2].strip()
        self._is_header, self._has_message = False, True
        self._is_call = recipient is not None
        self._is_dropped = recipient is not None and self.n_calls > 0 and not self._parallel
        self.is_reasoning = recipient is None and channel.startswith("analysis")
        if recipient is not None and not self._is_dropped:
            self.n_calls += 1
            yield ToolCallStart(self.n_calls - 1, recipient[1])

    def _emit(self, text: str) -> Iterator[ReasoningDelta | ToolCallEvent]:
        if not text or self._is_dropped:
            return
        if self._is_call:
            yield ToolCallArgumentsDelta(self.n_calls - 1, text)
        elif self.is_reasoning:
            yield ReasoningDelta(text)
        else:
            yield ContentDelta(text)
