"""How a preparation tells how far it is."""

from __future__ import annotations

from types import TracebackType
from typing import Never, Protocol, Self

from tqdm import tqdm


class Progress(Protocol):
    """Hears of bytes written."""

    def begin(self, label: str, *, total_bytes: int) -> None:
        """A piece of work of `total_bytes` begins."""

    def advance(self, size_bytes: int) -> None:
        """So many bytes more are written."""


class Silent:
    """Shows nothing."""

    def begin(self, label: str, *, total_bytes: int) -> None:
        """Ignore the beginning."""

    def advance(self, size_bytes: int) -> None:
        """Ignore the bytes."""


class Bar:
    """A progress bar on standard error; a context manager that leaves the bar finished."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def begin(self, label: str, *, total_bytes: int) -> None:
        """Show a new bar."""
        self._close()
        self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True)

    def advance(self, size_bytes: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
