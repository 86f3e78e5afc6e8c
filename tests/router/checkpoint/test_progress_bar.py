import io
import sys

import pytest
from tqdm import tqdm

from faasmoe_router.checkpoint.progress_bar import (
    LineProgress,
    LineWriter,
    ProgressBar,
    bar_class,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as bar:
        bar.start("preparing", total_bytes=4_000_000)
        for _ in range(4):
            bar.advance(1_000_000)
        bar.start("verifying", total_bytes=1000)
        bar.advance(1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "preparing: 0% (0.00 of 4.00M, 00:00)"
    assert "preparing: 100% (4.00M of 4.00M, 00:00)" in lines
    assert lines[-1] == "verifying: 100% (1.00k of 1.00k, 00:00)"
    assert "" not in lines


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert bar_class() is tqdm
    with ProgressBar() as bar:
        bar.start("preparing", total_bytes=10)
        bar.advance(10)
    assert "\r" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_lines_are_not_repeated_and_never_empty() -> None:
    stream = io.StringIO()
    writer = LineWriter(stream)
    for text in ("\rfirst  ", "\rfirst", "\n", "\x1b[A", "", "\rsecond"):
        writer.write(text)
    writer.flush()
    assert stream.getvalue() == "first\nsecond\n"


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with LineProgress(total=1000, desc="many") as bar:
        for _ in range(1000):
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 2  # the first and the last state
