"""Output of the child processes: prefixed lines on stderr, or one log file per process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self, TextIO

from faasmoe_operator.cli.formatting import format_bytes
from faasmoe_operator.errors import CommandError

PROGRESS_LINE_INTERVAL_S = 5.0


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
            return lambda line: _print_line(f"[{name}] {line}")
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
    _print_line(f"faasmoe: {text}")


def _print_line(line: str) -> None:
    """Print a line to stderr, above the progress bar if one is shown."""
    bars = sys.modules.get("tqdm")  # imported once a bar is shown
    if bars is None:
        print(line, file=sys.stderr, flush=True)
    else:
        bars.tqdm.write(line, file=sys.stderr)


@contextmanager
def byte_progress(label: str, *, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show progress in bytes on stderr: a bar on a terminal, else a line now and then.

    Yields:
        A function that is called with the number of bytes of each part that is done.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, leave=False) as bar:
            yield bar.update
    else:
        yield _LineProgress(label, total_bytes).advance


@contextmanager
def step_progress(label: str, steps: Sequence[str]) -> Iterator[Callable[[str], object]]:
    """Show on a terminal which of several steps are done, in any order; a log gets nothing.

    Args:
        label: what the steps are of.
        steps: their names.

    Yields:
        A function that is called with the name of each step that is done.
    """
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from tqdm import tqdm

    pending = list(steps)
    with tqdm(total=len(steps), desc=label, unit="step", leave=False) as bar:
        bar.set_postfix_str(f"waiting for {', '.join(pending)}")

        def done(step: str) -> None:
            pending.remove(step)
            bar.set_postfix_str(f"waiting for {', '.join(pending)}" if pending else "")
            bar.update()

        yield done


class _LineProgress:
    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total_bytes, self._done_bytes = label, total_bytes, 0
        self._printed_s = time.monotonic()

    def advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        now_s = time.monotonic()
        if now_s - self._printed_s >= PROGRESS_LINE_INTERVAL_S:
            self._printed_s = now_s
            done, total = format_bytes(self._done_bytes), format_bytes(self._total_bytes)
            print_progress(f"{self._label}: {done} of {total}")
