"""How many parts a JSON text has, counted before it is parsed.

Parsing holds the interpreter and costs by the number of values, not by bytes: a body of 8 MiB may
be one text, or millions of empty lists that take a quarter of a gigabyte and stop the event loop
for long, in whatever thread they are parsed. What is counted here are characters, by operations on
bytes that take milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_VALUES = 1 << 18
MAX_CONTAINERS = 1 << 15


@dataclass(frozen=True, slots=True)
class JsonParts:
    """Parts of a JSON text; of valid JSON, never fewer than it has.

    Attributes:
        n_values: values and names.
        n_containers: objects and lists among them.
    """

    n_values: int
    n_containers: int

    @property
    def is_within_limits(self) -> bool:
        """Whether it may be parsed."""
        return self.n_values <= MAX_VALUES and self.n_containers <= MAX_CONTAINERS


def count_parts(text: bytes) -> JsonParts:
    """Return the parts of a JSON text in UTF-8."""
    at_most = _count_characters(text)
    if at_most.is_within_limits:
        return at_most
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    n_quotes = unescaped.count(b'"')
    if n_quotes > 2 * MAX_VALUES:  # each text is a value or a name, and lists of them take memory
        return JsonParts(n_quotes // 2, at_most.n_containers)
    return _count_characters(b"".join(unescaped.split(b'"')[::2]))


def _count_characters(text: bytes) -> JsonParts:
    """Return the parts of a text that has no quoted texts."""
    n_containers = text.count(b"[") + text.count(b"{")
    return JsonParts(1 + n_containers + text.count(b",") + text.count(b":"), n_containers)
