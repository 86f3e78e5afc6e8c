"""Clients of an attack: quiet tenants, a probe, and those that hang up or send too much."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

REQUEST_TIMEOUT_S = 60.0
PROBE_INTERVAL_S = 0.005
MIN_PROBE_ANSWERS = 100
"""Answers that a probe needs before its slowest says anything."""


class AttackFailed(RuntimeError):
    """An attack that measures nothing; the message says why."""


@dataclass
class QuietTenants:
    """Two tenants that send one short request after the other.

    Attributes:
        latencies_s: of the answers.
        n_failed: requests without a complete answer.
    """

    url: str
    latencies_s: list[float] = field(default_factory=list)
    n_failed: int = 0

    async def run(self, seconds: float) -> None:
        """Send requests for a while."""
        async with AsyncExitStack() as stack:
            clients = [  # making one takes longer than a request
                await stack.enter_async_context(
                    httpx.AsyncClient(
                        headers={"Authorization": f"Bearer {name}-key"}, timeout=REQUEST_TIMEOUT_S
                    )
                )
                for name in ("quiet", "calm")
            ]
            await asyncio.gather(*(self._run_tenant(client, seconds) for client in clients))

    async def _run_tenant(self, client: httpx.AsyncClient, seconds: float) -> None:
        body = {"model": "tiny", "prompt": "the quick brown", "max_tokens": 4, "temperature": 0}
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            start_s = time.monotonic()
            try:
                response = await client.post(f"{self.url}/v1/completions", json=body)
                self.n_failed += response.status_code != 200
            except httpx.HTTPError:
                self.n_failed += 1
            self.latencies_s.append(time.monotonic() - start_s)
            await asyncio.sleep(0.02)


class Probe:
    """Asks for /ping on one connection, as often as it is answered; remembers the slowest answer.

    Attributes:
        max_s: the slowest answer.
        n_answers: how many there were.
    """

    def __init__(self, url: str) -> None:
        self.max_s = 0.0
        self.n_answers = 0
        self._url = url
        self._stop = threading.Event()
        self._error: Exception | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Probe for the lifetime of the context; raises AttackFailed at its end if that failed."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise AttackFailed if the probe has ended early."""
        if self._error is not None:
            raise AttackFailed(
                f"the probe failed after {self.n_answers} answers: {self._error!r}"
            ) from self._error

    def rounds(self, *, timeout_s: float) -> Iterator[int]:
        """Number rounds of an attack, one at least, until the probe has answers enough.

        Raises:
            AttackFailed: the probe has failed, or too few answers after `timeout_s`.
        """
        end_s = time.monotonic() + timeout_s
        for number in itertools.count(1):
            yield number
            self.check()
            if self.n_answers >= MIN_PROBE_ANSWERS:
                return
            if time.monotonic() >= end_s:
                raise AttackFailed(
                    f"the probe was answered {self.n_answers} times in {timeout_s:g} s and "
                    f"{number} rounds, expected {MIN_PROBE_ANSWERS}: the front hardly answers, its "
                    f"slowest answer took {self.max_s:.2f} s, or this machine is too busy"
                )

    def _run(self) -> None:
        try:
            self._ask()
        except Exception as error:
            self._error = error

    def _ask(self) -> None:
        with connect(self._url) as connection:
            while not self._stop.wait(PROBE_INTERVAL_S):
                start_s = time.monotonic()
                connection.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = b""
                while not answer.endswith(b'"ok"}'):
                    part = connection.recv(4096)
                    if not part:
                        raise AttackFailed("the connection of the probe was closed")
                    answer += part
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise AttackFailed(f"got {answer[:200]!r}, expected status 200")
                self.max_s = max(self.max_s, time.monotonic() - start_s)
                self.n_answers += 1


def connect(url: str) -> socket.socket:
    """Return a connection to the router."""
    parts = urlsplit(url)
    assert parts.port is not None
    return socket.create_connection(("127.0.0.1", parts.port), timeout=REQUEST_TIMEOUT_S)


def completion_request(key: str, prompt: str, **fields: object) -> bytes:
    """Return a complete HTTP request for a completion."""
    body = json.dumps({"model": "tiny", "prompt": prompt, **fields}).encode()
    return post_request(key, "/v1/completions", body)


def post_request(key: str, path: str, body: bytes) -> bytes:
    """Return a complete HTTP request with a body."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class QuietStreams:
    """Streams that each begin and are read to their end at the same time.

    Attributes:
        texts: what each has streamed.
        n_cut: streams without an end.
    """

    url: str
    n_streams: int
    texts: dict[int, str] = field(default_factory=dict)
    n_cut: int = 0

    async def run(self, on_begun: Callable[[], None] = lambda: None) -> None:
        """Read all streams; call `on_begun` once each has begun."""
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
            streams = [self._read(client, number) for number in range(self.n_streams)]
            reading = asyncio.gather(*streams)
            while not all(len(self.texts.get(n, "")) > 20 for n in range(self.n_streams)):
                if reading.done():
                    break
                await asyncio.sleep(0.001)
            on_begun()
            await reading

    async def _read(self, client: httpx.AsyncClient, number: int) -> None:
        sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": number}
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 200, **sampling}
        headers = {"Authorization": "Bearer quiet-key"}
        is_complete, text = False, ""
        try:
            async with client.stream(
                "POST", f"{self.url}/v1/completions", json={**body, "stream": True}, headers=headers
            ) as response:
                async for line in response.aiter_lines():
                    is_complete = is_complete or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        text += "".join(choice["text"] for choice in event.get("choices", ()))
                        self.texts[number] = text
        except httpx.HTTPError:
            is_complete = False
        self.n_cut += not is_complete


async def hang_up_storm(url: str, *, seconds: float, n_clients: int, seed: int) -> int:
    """Send requests of one tenant and hang up after 50 ms to 2 s; return how many."""
    port = urlsplit(url).port
    end_s = time.monotonic() + seconds
    n_hang_ups = 0

    async def run_client(number: int) -> None:
        nonlocal n_hang_ups
        draw = random.Random(seed * 1000 + number)
        while time.monotonic() < end_s:
            prompt = "the quick brown fox " * draw.choice((1, 40, 2000))
            content = completion_request("flood-key", prompt, max_tokens=100)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(content)
                await asyncio.sleep(draw.uniform(0.05, 2.0))
                writer.transport.abort() if draw.random() < 0.5 else writer.close()
            except OSError:
                continue
            n_hang_ups += 1

    await asyncio.gather(*(run_client(number) for number in range(n_clients)))
    return n_hang_ups
