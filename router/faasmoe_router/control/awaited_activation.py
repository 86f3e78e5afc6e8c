"""The span of the activation that queued requests wait for: one at a time, however many wait.

It is a child of the first queued request that is recorded, and is handed to the control plane,
where the activation's own spans follow. Every other request that waits links to it.
"""

from __future__ import annotations

from collections.abc import Callable

from faasmoe_tracing import NO_SPAN, Span, SpanKind

SPAN_NAME = "activate"


class AwaitedActivation:
    """The activation that requests wait for.

    Args:
        on_changed: called with the `traceparent` to send with activation requests; empty for none.
    """

    def __init__(self, on_changed: Callable[[str], None] = lambda traceparent: None) -> None:
        self._on_changed = on_changed
        self._span = NO_SPAN
        self._first = NO_SPAN

    def join(self, hold: Span) -> None:
        """Record that a request begins to wait; `hold` is the span of its wait."""
        if self._span.is_recorded or not hold.traceparent:
            return
        self._first = hold
        self._span = hold.child(SPAN_NAME, kind=SpanKind.CLIENT)
        self._on_changed(self._span.traceparent)

    def leave(self, hold: Span) -> None:
        """Record that a request has stopped waiting."""
        if hold is not self._first and self._span.is_recorded:
            hold.link(self._span.traceparent)

    def finish(self) -> None:
        """Record that no request waits any more."""
        span, self._span, self._first = self._span, NO_SPAN, NO_SPAN
        span.end()
        if span.traceparent:
            self._on_changed("")
