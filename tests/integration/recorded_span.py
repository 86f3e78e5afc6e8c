"""A span for tests: it keeps what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from faasmoe_tracing import Attribute, Span, SpanKind


@dataclass
class RecordedSpan(Span):
    """A span that keeps what it is told."""

    name: str
    start_ns: int | None = None
    attributes: dict[str, Attribute] = field(default_factory=dict)
    children: list[RecordedSpan] = field(default_factory=list)
    end_ns: int | None = None
    is_ended: bool = False
    error: str = ""

    @property
    def is_recorded(self) -> bool:
        return True

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> RecordedSpan:
        child = RecordedSpan(name, start_ns, dict(attributes or {}))
        self.children.append(child)
        return child

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self.attributes |= attributes

    def fail(self, error_type: str) -> None:
        self.error = error_type

    def end(self, end_ns: int | None = None) -> None:
        self.end_ns, self.is_ended = end_ns, True
