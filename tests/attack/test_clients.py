"""The probe of an attack: what it does with a front that closes it, answers late or not at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.attack.clients import MIN_PROBE_ANSWERS, AttackFailed, Probe

PONG = b'HTTP/1.1 200 OK\r\n\r\n{"status":"ok"}'


@contextmanager
def front(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the URL of a server that leaves its first connection to `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def answer_all(connection: socket.socket) -> None:
    while connection.recv(4096):
        connection.sendall(PONG)


def close_after_one(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(PONG)
    connection.recv(4096)


def test_rounds_go_on_until_the_probe_has_answers_enough() -> None:
    with front(answer_all) as url:
        probe = Probe(url)
        with probe.running():
            n_rounds = sum(1 for _ in probe.rounds(timeout_s=60.0))
    assert n_rounds > 1
    assert probe.n_answers >= MIN_PROBE_ANSWERS
    assert probe.max_s > 0


def test_attack_says_that_its_probe_had_too_few_answers() -> None:
    with front(answer_all) as url:
        probe = Probe(url)
        with (
            pytest.raises(AttackFailed, match=r"was answered \d+ times in 0 s and 1 rounds"),
            probe.running(),
        ):
            list(probe.rounds(timeout_s=0.0))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (close_after_one, "failed after 1 answers: .*was closed"),
        (lambda c: c.sendall(PONG.replace(b"200 OK", b"503 No")), "failed after 0 answers: .*503"),
    ],
)
def test_attack_says_how_its_probe_failed(
    answer: Callable[[socket.socket], None], reason: str
) -> None:
    with front(answer) as url:
        probe = Probe(url)
        with pytest.raises(AttackFailed, match=reason), probe.running():
            list(probe.rounds(timeout_s=60.0))
