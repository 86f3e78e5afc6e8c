"""What traced code uses: a tracer and its spans. Those of this module do nothing.

Whoever begins a span ends it; `with` does so, and records an exception as the span's error. Times
are nanoseconds since the epoch; `epoch_ns` makes them of times of another clock, so that what was
measured anyway need not be measured again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Self

TRACEPARENT = "traceparent"
"""The header by which a span is handed to the next process (W3C Trace Context)."""

Attribute = str | bool | int | float | Sequence[str]


class SpanKind(Enum):
    """Where a span stands in a call between processes."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Span:
    """A span that is not recorded."""

    __slots__ = ()

    @property
    def is_recorded(self) -> bool:
        """Whether it is exported: whether attributes are worth computing."""
        return False

    @property
    def traceparent(self) -> str:
        """The header value that makes the next process's span a child; empty without tracing."""
        return ""

    @property
    def trace_id(self) -> str:
        """Id of its trace, 32 hexadecimal digits; empty if it is not recorded."""
        return ""

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """Begin a child.

        Args:
            name: its name, one of few.
            kind: where it stands in a call.
            attributes: what is known of it.
            start_ns: when it began; None for now.
        """
        return self

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes."""

    def link(self, traceparent: str) -> None:
        """Refer to a span of another trace that this one waited for."""

    def fail(self, error_type: str) -> None:
        """Mark it as failed, with an error of few types, such as a status or a class."""

    def end(self, end_ns: int | None = None) -> None:
        """End it, now or then; only the first time counts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self.end()


class Tracer:
    """A tracer without an exporter."""

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """Begin a span of this process.

        Args:
            name: its name, one of few.
            traceparent: the span that it is a child of; empty or invalid begins a trace.
            kind: where it stands in a call.
            attributes: what is known of it.
            start_ns: when it began; None for now.
        """
        return NO_SPAN

    @property
    def is_enabled(self) -> bool:
        """Whether spans may be recorded."""
        return False

    def close(self) -> None:
        """Export what is left, for a moment at most."""


NO_SPAN = Span()
NO_TRACER = Tracer()


def epoch_ns(at_s: float, *, now_s: float, now_ns: int | None = None) -> int:
    """Return a time as nanoseconds since the epoch.

    Args:
        at_s: the time, in seconds of any clock.
        now_s: that clock's current time.
        now_ns: the same as nanoseconds since the epoch, for several times that belong together;
            None reads the clock.
    """
    return (time.time_ns() if now_ns is None else now_ns) - round((now_s - at_s) * 1e9)
