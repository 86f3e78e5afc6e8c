"""Output of the child processes: prefixed lines on stderr, or one log file per process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TextIO

from faasmoe_operator.errors import CommandError


class LogSinks:
    """Creates one sink per child process and closes the log files on exit.

    Args:
        directory: folder of the log files; None prints to stderr.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._files = ExitStack()

    def __enter__(self) -> Self:
        """Create the directory; raises CommandError if that fails."""
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CommandError(
                    f"--log-dir: {self._directory} cannot be created: {error.strerror}",
                    exit_status=2,
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._files.close()

    def sink(self, name: str) -> Callable[[str], None]:
        """Return a function that writes one output line of the named child."""
        if self._directory is None:
            return lambda line: print(f"[{name}] {line}", file=sys.stderr, flush=True)
        file = self._open(self._directory / f"{name}.log")
        return lambda line: print(line, file=file, flush=True)

    def _open(self, path: Path) -> TextIO:
        try:
            return self._files.enter_context(path.open("a", encoding="utf-8"))
        except OSError as error:
            raise CommandError(
                f"--log-dir: {path} cannot be written: {error.strerror}", exit_status=2
            ) from error


def print_progress(text: str) -> None:
    """Print a progress message to stderr, so that stdout stays machine-readable."""
    print(f"faasmoe: {text}", file=sys.stderr, flush=True)
