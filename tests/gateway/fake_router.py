"""A router on a Unix socket that answers as a test says, or dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class FakeRouter:
    """Answers each request with the next of its answers; the last one repeats.

    Attributes:
        requests: what it was sent: head and body.
    """

    def __init__(self, path: Path, *answers: Answer) -> None:
        self.requests: list[bytes] = []
        self._path = path
        self._answers = list(answers)
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeRouter:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        self.requests.append(head + body)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        await answer(body, writer)
        writer.close()


async def die(body: bytes, writer: asyncio.StreamWriter) -> None:
    """End the connection without an answer."""


def reply(body: bytes, *, status: int = 200, **headers: int | str) -> Answer:
    """Return an answer with a JSON body, and headers with `_` for `-`."""

    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        head += "".join(f"{n.replace('_', '-')}: {value}\r\n" for n, value in headers.items())
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    return answer


def stream(*records: bytes, is_whole: bool = True, n_input: int = 1) -> Answer:
    """Return an answer with records, which breaks off unless it is whole."""

    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-faasmoe-records: 1\r\n"
            b"x-faasmoe-input-tokens: %d\r\ntransfer-encoding: chunked\r\n\r\n" % n_input
        )
        for record in records:
            writer.write(b"%x\r\n%b\r\n" % (len(record), record))
        if is_whole:
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    return answer
