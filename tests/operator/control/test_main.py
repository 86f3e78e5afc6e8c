import time
from pathlib import Path

import pytest
from core_waits import Stopwatch

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


@pytest.mark.parametrize("socket", ["", "/no/such/folder/zygote.sock"])
def test_wait_without_a_socket_ends(socket: str) -> None:
    stopwatch = Stopwatch()
    control.wait_for_zygote(socket, timeout_s=0.05)
    assert stopwatch.elapsed_s() < 5
