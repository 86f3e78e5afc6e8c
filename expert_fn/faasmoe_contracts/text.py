"""Rendering of untrusted values in error messages."""

MAX_REPR_CHARS = 80


def short_repr(value: object) -> str:
    """Return `repr(value)` truncated to 80 characters, because clients may send megabytes."""
    # Truncate strings before repr, which may need several times their memory.
    text = repr(value[: MAX_REPR_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_REPR_CHARS else f"{text[: MAX_REPR_CHARS - 3]}..."
