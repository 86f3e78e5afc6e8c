"""What a preparation reports its progress to."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a preparation."""

    def start(self, label: str, *, total_bytes: int) -> None:
        """Start a task of `total_bytes`."""

    def advance(self, size_bytes: int) -> None:
        """Report `size_bytes` more as written."""


class NoProgress:
    """Ignores progress."""

    def start(self, label: str, *, total_bytes: int) -> None:
        """Do nothing."""

    def advance(self, size_bytes: int) -> None:
        """Do nothing."""
