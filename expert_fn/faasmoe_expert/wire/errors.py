"""What can be wrong with a frame."""

from __future__ import annotations


class WireError(ValueError):
    """A frame that breaks the format.

    Attributes:
        field: the part of the frame at fault, as named in docs/wire.md.
    """

    def __init__(self, field: str, *, got: object, expected: object) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field = field
