"""Text of untrusted values for error messages."""

MAX_REPR_CHARS = 80


def short_repr(value: object) -> str:
    """Return a value as an error message shows it: cut, because a client may send megabytes."""
    # A text is cut first: its repr may take several times its memory.
    text = repr(value[: MAX_REPR_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_REPR_CHARS else f"{text[: MAX_REPR_CHARS - 3]}..."
