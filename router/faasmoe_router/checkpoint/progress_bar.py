"""Progress on standard error: tqdm's bars on a terminal, else a whole line now and then."""

from __future__ import annotations

import re
import sys
from types import TracebackType
from typing import Any, Never, Self, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 5.0
_CURSOR_MOVE = re.compile(r"\x1b\[[0-9]*[A-Z]")  # tqdm moves to the bars below the first
LINE_FORMAT = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt}, {elapsed})"


class ProgressBar:
    """A progress bar in bytes; use it as a context manager, which closes the bar."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def start(self, label: str, *, total_bytes: int) -> None:
        """Show a new bar."""
        self._close()
        self._bar = bar_class()(total=total_bytes, desc=label, unit="B", unit_scale=True)

    def advance(self, size_bytes: int) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def bar_class() -> type[tqdm[Any]]:
    """Return tqdm, or a class like it that prints whole lines if stderr is no terminal."""
    return tqdm if sys.stderr.isatty() else LineProgress


class LineProgress(tqdm):  # type: ignore[type-arg]
    """A tqdm for logs: prints its state as a line of its own, at most every few seconds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        settings = {
            "file": LineWriter(sys.stderr),
            "mininterval": LINE_INTERVAL_S,
            "bar_format": LINE_FORMAT,
        }
        super().__init__(*args, **{**options, **settings})


class LineWriter:
    """A text stream that turns what tqdm writes, to redraw a line, into whole lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        """Write a state that is not empty and not the last one."""
        line = _CURSOR_MOVE.sub("", text).strip()
        if line and line != self._last:
            self._last = line
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
