"""One keep-alive HTTP/1.1 connection to a sandbox, driven from the engine's thread.

Hand-held because this is the hot path (docs/performance.md, "Hot path client"): a call is one
scatter-gather send and, mostly, one receive into a buffer that is reused. It speaks only what a
sandbox answers: a status line, headers with a content-length, a body. Over a Unix socket large
frames lie in shared memory instead (sharing.py).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path

from faasmoe_expert.same_node import connect_near
from faasmoe_expert.shared_region import FRAME_HEADER
from faasmoe_expert.wire.checksum import Buffer
from faasmoe_router.dispatch.errors import CallError, CannotConnect, Refused
from faasmoe_router.dispatch.sharing import SHARED_FRAME_BYTES, SharedOutbox

MAX_HEAD_BYTES = 16 << 10
MAX_ANSWER_BYTES = 64 << 20  # what a sandbox may send before it is cut off
FIRST_BUFFER_BYTES = 128 << 10
KEPT_BUFFER_BYTES = 1 << 20  # a larger one is given back when the connection goes idle
MAX_LENGTH_DIGITS = 12
IOV_MAX = 64


class Connection:
    """A socket with at most one call in flight.

    Args:
        address: host:port.
        socket_dir: where sandboxes of this machine have Unix sockets; see `same_node`.
        shared_bytes: frames of so many bytes and more are shared with such a sandbox, not sent.

    Attributes:
        address: host:port.
        connected: whether the sandbox has accepted it; sending begins before that is known.
    """

    def __init__(
        self,
        address: str,
        *,
        socket_dir: Path | None = None,
        shared_bytes: int = SHARED_FRAME_BYTES,
    ) -> None:
        self.address = address
        self.connected = False
        near = None if socket_dir is None else connect_near(socket_dir, address)
        self._socket = near or _connecting(address)
        self._shared = None if near is None else SharedOutbox(shared_bytes)
        self._place: bytes | None = None  # of an answer that is shared
        self._used = False
        self._reused = False
        self._closing = False
        self._status = 0
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

    @property
    def is_near(self) -> bool:
        """Whether the sandbox is on this machine, with a Unix socket."""
        return self._shared is not None

    @property
    def is_stale(self) -> bool:
        """Whether a failure now may only mean that the sandbox had closed it while idle."""
        return self._reused and not self._filled

    @property
    def is_reusable(self) -> bool:
        """Whether another call may follow the one that was answered."""
        return not self._closing and not self._unsent

    def start(self, head: bytes, body: Sequence[Buffer]) -> None:
        """Begin a call: send as much as the socket takes; raises CallError.

        Args:
            head: request line and headers, but for those that say where the body is.
            body: its bytes, in parts.
        """
        self._reused, self._used = self._used, True
        self._filled = self._body_start = self._body_end = 0
        parts: Sequence[memoryview] = [memoryview(part).cast("B") for part in body]
        if self._shared is None:
            lines = f"content-length: {sum(len(part) for part in parts)}\r\n"
        else:
            lines, parts = self._shared.put(parts)
        ended = memoryview(head + lines.encode() + b"\r\n")
        self._unsent = [ended, *(part for part in parts if len(part))]
        self.send()

    def send(self) -> None:
        """Send more of the call; raises CallError."""
        while self._unsent:
            try:
                sent = self._socket.sendmsg(self._unsent[:IOV_MAX])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._failed("send", error) from error
            self.connected = True
            self._drop(sent)

    def receive(self) -> bool:
        """Read what is there; return whether the answer is whole; raises CallError."""
        while True:
            try:
                count = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._failed("receive", error) from error
            if count == 0:
                raise CallError(f"{self.address}: closed after {self._filled} bytes of an answer")
            self._filled += count
            if self._whole():
                return True

    def answer(self) -> memoryview:
        """Return the body of a whole answer, valid until the next call; raises Refused."""
        body = memoryview(self._buffer)[self._body_start : self._body_end]
        if self._status != 200:
            raise Refused(self._status, bytes(body[:200]).decode("utf-8", "replace"))
        if self._place is not None and self._shared is not None:
            return self._shared.answer(self._place)
        return body

    def rest(self) -> None:
        """Give back what an idle connection need not hold."""
        if len(self._buffer) > KEPT_BUFFER_BYTES:
            self._buffer = bytearray(FIRST_BUFFER_BYTES)

    def rest_long(self) -> None:
        """Give back what is kept between calls because they follow each other closely."""
        self._buffer = bytearray(FIRST_BUFFER_BYTES)
        if self._shared is not None:
            self._shared.rest()

    def close(self) -> None:
        """Close the socket, and give back what is shared."""
        self._socket.close()
        if self._shared is not None:
            self._shared.close()

    def _failed(self, verb: str, error: OSError) -> CallError:
        if not self.connected:
            return CannotConnect(f"{self.address}: cannot connect: {error}")
        return CallError(f"{self.address}: cannot {verb}: {error}")

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
            self._grow(self._body_end)
        return self._filled == self._body_end

    def _grow(self, size_bytes: int) -> None:
        grown = bytearray(size_bytes)  # a new one: somebody may still hold a view of the old
        grown[: self._filled] = memoryview(self._buffer)[: self._filled]
        self._buffer = grown

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, min(self._filled, MAX_HEAD_BYTES + 4))
        if end < 0:
            return False
        status_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = dict(_header(line) for line in lines)
        length = headers.get(b"content-length", b"")
        version, _, rest = status_line.partition(b" ")
        if version != b"HTTP/1.1" or not rest[:3].isdigit() or not _is_length(length):
            raise CallError(f"{self.address}: not an HTTP/1.1 answer with a content-length")
        if int(length) > MAX_ANSWER_BYTES:
            raise CallError(f"{self.address}: answer of {int(length)} bytes is too large")
        self._closing = headers.get(b"connection", b"").lower() == b"close"
        self._status = int(rest[:3])
        self._place = headers.get(FRAME_HEADER.encode())
        if self._shared is not None:
            self._shared.hear(headers)
        self._body_start = end + 4
        self._body_end = self._body_start + int(length)
        return True


def _connecting(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = places[0]
        connecting = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:
        raise CannotConnect(f"{address}: cannot connect: {error}") from error
    connecting.setblocking(False)
    connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = connecting.connect_ex(place)
    if code not in (0, errno.EINPROGRESS):
        connecting.close()
        raise CannotConnect(f"{address}: cannot connect: {os.strerror(code)}")
    return connecting


def _is_length(text: bytes) -> bool:
    return text.isdigit() and len(text) <= MAX_LENGTH_DIGITS


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()
