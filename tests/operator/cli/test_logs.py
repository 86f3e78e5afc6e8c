import io
import sys

import pytest

from faasmoe_operator.cli.logs import byte_progress, print_progress, step_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = iter([0.0, 1.0, 5.0, 6.0, 11.0])
    monkeypatch.setattr("faasmoe_operator.cli.logs.time.monotonic", lambda: next(now_s))
    with byte_progress("verifying", total_bytes=4 << 20) as advance:
        for _ in range(4):
            advance(1 << 20)
    assert capsys.readouterr().err.splitlines() == [
        "faasmoe: verifying: 2.0 MiB of 4.0 MiB",
        "faasmoe: verifying: 4.0 MiB of 4.0 MiB",
    ]


def test_a_terminal_gets_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with byte_progress("verifying", total_bytes=10) as advance:
        print_progress("starting")
        advance(10)
    output = terminal.getvalue()
    assert "verifying:   0%" in output
    assert "faasmoe: starting\n" in output
    assert output.endswith("\r")  # the bar is gone


def test_a_terminal_sees_which_steps_are_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with step_progress("starting", ("control", "router")) as done:
        done("control")
        done("router")
    output = terminal.getvalue()
    assert "waiting for control, router" in output
    assert "waiting for router" in output
    assert output.endswith("\r")  # the bar is gone


def test_a_log_sees_no_bar_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with step_progress("starting", ("control",)) as done:
        done("control")
    assert capsys.readouterr().err == ""
