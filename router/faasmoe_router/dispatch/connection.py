"""One keep-alive HTTP/1.1 connection to a sandbox, driven from the engine's thread.

Hand-held because this is the hot path (docs/performance.md, "Hot path client"): a call is one
scatter-gather send and, mostly, one receive into a buffer that is reused. It speaks only what a
sandbox answers: a status line, headers with a content-length, a body.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from faasmoe_expert.wire.request import Buffer
from faasmoe_router.dispatch.errors import CallError, Refused

MAX_HEAD_BYTES = 16 << 10
MAX_ANSWER_BYTES = 64 << 20  # what a sandbox may send before it is cut off
FIRST_BUFFER_BYTES = 128 << 10
IOV_MAX = 64


class Connection:
    """A socket with at most one call in flight.

    Attributes:
        address: host:port.
        used: calls answered so far; the first failure of a used connection may only mean that the
            sandbox closed it while idle.
    """

    def __init__(self, address: str, *, connect_timeout_s: float) -> None:
        host, _, port = address.rpartition(":")
        self.address = address
        self.used = 0
        try:
            self._socket = socket.create_connection((host, int(port)), connect_timeout_s)
        except OSError as error:
            raise CallError(f"{address}: cannot connect: {error}") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._unsent: list[memoryview] = []
        self._buffer = bytearray(FIRST_BUFFER_BYTES)
        self._filled = 0
        self._body_start = 0
        self._body_end = 0

    def fileno(self) -> int:
        """Return the file descriptor, for poll."""
        return self._socket.fileno()

    @property
    def events(self) -> int:
        """What to poll for: writing while some of the call is unsent, and reading."""
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def start(self, head: bytes, body: Sequence[Buffer]) -> None:
        """Begin a call: send as much as the socket takes; raises CallError."""
        self._filled = self._body_start = self._body_end = 0
        self._unsent = [memoryview(head), *(memoryview(part).cast("B") for part in body)]
        self.send()

    def send(self) -> None:
        """Send more of the call; raises CallError."""
        while self._unsent:
            try:
                sent = self._socket.sendmsg(self._unsent[:IOV_MAX])
            except BlockingIOError:
                return
            except OSError as error:
                raise CallError(f"{self.address}: cannot send: {error}") from error
            self._drop(sent)

    def receive(self) -> bool:
        """Read what is there; return whether the answer is whole; raises CallError."""
        while True:
            try:
                count = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise CallError(f"{self.address}: cannot receive: {error}") from error
            if count == 0:
                raise CallError(f"{self.address}: closed after {self._filled} bytes of an answer")
            self._filled += count
            if self._whole():
                self.used += 1
                return True

    def answer(self) -> memoryview:
        """Return the body of a whole answer, valid until the next call; raises Refused."""
        body = memoryview(self._buffer)[self._body_start : self._body_end]
        if self._status != 200:
            raise Refused(self._status, bytes(body[:200]).decode("utf-8", "replace"))
        return body

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _drop(self, sent: int) -> None:
        while sent:
            first = self._unsent[0]
            if sent < len(first):
                self._unsent[0] = first[sent:]
                return
            sent -= len(first)
            del self._unsent[0]

    def _whole(self) -> bool:
        if not self._body_end and not self._read_head():
            if self._filled > MAX_HEAD_BYTES:
                raise CallError(f"{self.address}: head of more than {MAX_HEAD_BYTES} bytes")
            return False
        if self._filled > self._body_end:
            raise CallError(f"{self.address}: bytes after the end of an answer")
        if self._body_end > len(self._buffer):
            self._buffer.extend(bytes(self._body_end - len(self._buffer)))
        return self._filled == self._body_end

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, min(self._filled, MAX_HEAD_BYTES + 4))
        if end < 0:
            return False
        status_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = dict(_header(line) for line in lines)
        length = headers.get(b"content-length", b"")
        version, _, rest = status_line.partition(b" ")
        if version != b"HTTP/1.1" or not rest[:3].isdigit() or not length.isdigit():
            raise CallError(f"{self.address}: not an HTTP/1.1 answer with a content-length")
        if int(length) > MAX_ANSWER_BYTES:
            raise CallError(f"{self.address}: answer of {int(length)} bytes is too large")
        self._status = int(rest[:3])
        self._body_start = end + 4
        self._body_end = self._body_start + int(length)
        return True


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()
