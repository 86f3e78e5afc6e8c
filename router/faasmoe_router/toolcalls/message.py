"""Streaming parser of one message: reasoning first, then content and tool calls."""

from typing import Protocol

from faasmoe_router.toolcalls.harmony import HarmonyParser
from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallEvent
from faasmoe_router.toolcalls.reasoning import ReasoningDelta, ReasoningParser

MessageEvent = ReasoningDelta | ToolCallEvent


class CallParser(Protocol):
    """Parses tool calls in a stream of text.

    Attributes:
        n_calls: number of calls started so far.
    """

    n_calls: int

    def feed(self, text: str) -> list[ToolCallEvent]:
        """Parse more text; return the events that it completes."""

    def flush(self) -> list[ToolCallEvent]:
        """Return the events of the text held back; called at the end of the text."""


class MessageParser:
    """Parses the parts of one message; marks of calls within reasoning are not calls.

    Args:
        reasoning: separates reasoning; None if the model has none.
        calls: parses tool calls in the rest; None if the model may not call any.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: CallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def n_calls(self) -> int:
        """Number of calls started so far."""
        return 0 if self._calls is None else self._calls.n_calls

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends within reasoning."""
        return self._reasoning is not None and self._reasoning.is_reasoning

    def feed(self, text: str) -> list[MessageEvent]:
        """Parse more text; return the events that it completes."""
        if self._reasoning is None:
            return self._feed_calls(text)
        return self._split(self._reasoning.feed(text))

    def flush(self) -> list[MessageEvent]:
        """Return the events of the text held back; called at the end of the text."""
        events = [] if self._reasoning is None else self._split(self._reasoning.flush())
        return events if self._calls is None else [*events, *self._calls.flush()]

    def _split(self, deltas: list[ReasoningDelta | ContentDelta]) -> list[MessageEvent]:
        events: list[MessageEvent] = []
        for delta in deltas:
            if isinstance(delta, ReasoningDelta):
                events.append(delta)
            else:
                events += self._feed_calls(delta.text)
        return events

    def _feed_calls(self, text: str) -> list[MessageEvent]:
        if self._calls is not None:
            return [*self._calls.feed(text)]
        return [ContentDelta(text)] if text else []


AnyMessageParser = MessageParser | HarmonyParser
