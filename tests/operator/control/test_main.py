import time
from pathlib import Path

import pytest

from faasmoe_operator.control import __main__ as control


def test_wait_ends_when_the_socket_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket, sleeps = tmp_path / "zygote.sock", []

    def create_at_third_sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            socket.touch()

    monkeypatch.setattr(time, "sleep", create_at_third_sleep)
    control.wait_for_zygote(str(socket), timeout_s=60)
    assert len(sleeps) == 3


@pytest.mark.parametrize(
    ("socket", "waited_s"),
    [("", 0.0), ("/no/such/folder/zygote.sock", pytest.approx(0.05, abs=0.02))],
)
def test_wait_without_a_socket_ends(
    socket: str, waited_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    control.wait_for_zygote(socket, timeout_s=0.05)
    assert now_s == waited_s
