"""The trace of the activation that requests wait for: waking, placing, attaching. Pure but for it.

One at a time: functions that are asked for while it runs join it. It counts functions and names
none, so that what a request needed is told no better than its length tells it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from faasmoe_tracing import Attribute, Span, SpanKind, Tracer, epoch_ns


@dataclass(slots=True)
class _Activation:
    """An activation that is running; times in seconds of the caller's clock."""

    span: Span
    started_s: float
    started_ns: int  # the same since the epoch
    awaited: set[str]
    placed_s: float | None = None
    attach_s: float | None = None
    n_ready: int = 0
    longest_attach_s: float = 0.0


@dataclass(slots=True)
class ActivationTrace:
    """Follows one model's activations.

    Args:
        tracer: traces them.
        model: the model's name.
    """

    tracer: Tracer
    model: str
    _current: _Activation | None = field(default=None)

    def begin(
        self, functions: Collection[str], *, traceparent: str, started_s: float, now_s: float
    ) -> None:
        """Record that functions are awaited.

        Args:
            functions: functions at zero that a request waits for.
            traceparent: the span of the wait; empty if it is not traced.
            started_s: when the first of them was asked for.
            now_s: current time.
        """
        if self._current is not None:
            self._current.awaited.update(functions)
            return
        if not functions or not traceparent:
            return
        started_ns = epoch_ns(started_s, now_s=now_s)
        span = self.tracer.span(
            f"activation {self.model}",
            traceparent=traceparent,
            kind=SpanKind.SERVER,
            attributes={"faasmoe.model": self.model},
            start_ns=started_ns,
        )
        if span.is_recorded:
            self._current = _Activation(span, started_s, started_ns, set(functions))

    def record_plan(self, now_s: float) -> None:
        """Record that functions are about to be placed."""
        if self._current is not None and self._current.placed_s is None:
            self._current.placed_s = now_s

    def record_attach(self, function: str, now_s: float) -> None:
        """Record that an attach has begun."""
        current = self._current
        if current is not None and current.attach_s is None and function in current.awaited:
            current.attach_s = now_s

    def record_attached(self, function: str, duration_s: float) -> None:
        """Record that an attach has ended."""
        current = self._current
        if current is not None and function in current.awaited:
            current.longest_attach_s = max(current.longest_attach_s, duration_s)

    def record_ready(self, functions: Iterable[str], now_s: float) -> None:
        """Record that functions can be called."""
        current = self._current
        if current is None:
            return
        ready = current.awaited.intersection(functions)
        current.awaited -= ready
        current.n_ready += len(ready)
        if not current.awaited:
            self._finish(current, now_s)

    def record_abandoned(self, functions: Iterable[str], now_s: float) -> None:
        """Record that functions are awaited no more, although they are not ready."""
        current = self._current
        if current is None or current.awaited.isdisjoint(functions):
            return
        current.span.fail("timeout")
        current.awaited.difference_update(functions)
        if not current.awaited:
            self._finish(current, now_s)

    def _finish(self, current: _Activation, now_s: float) -> None:
        self._current = None
        placed_s = now_s if current.placed_s is None else current.placed_s
        attach_s = now_s if current.attach_s is None else max(current.attach_s, placed_s)
        attached: dict[str, Attribute] = {
            "faasmoe.functions": current.n_ready,
            "faasmoe.longest_attach_ms": round(1e3 * current.longest_attach_s, 3),
        }
        steps: tuple[tuple[str, float, float, dict[str, Attribute]], ...] = (
            ("wake", current.started_s, placed_s, {}),
            ("place", placed_s, attach_s, {}),
            ("attach", attach_s, now_s, attached),
        )
        since, since_ns = current.started_s, current.started_ns  # so that the steps add up
        for name, start_s, end_s, attributes in steps:
            start_ns = epoch_ns(start_s, now_s=since, now_ns=since_ns)
            child = current.span.child(name, start_ns=start_ns, attributes=attributes)
            child.end(epoch_ns(end_s, now_s=since, now_ns=since_ns))
        current.span.end(epoch_ns(now_s, now_s=since, now_ns=since_ns))
