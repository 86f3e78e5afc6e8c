"""Large frames of one connection in memory that is shared with the sandbox; small ones are sent.

The memory is offered beside the first large frame, which is sent, and used once the sandbox has
said that it has mapped it. A sandbox that says nothing gets all frames over its socket: of another
version, user or PID namespace. See docs/wire.md, "Frames in shared memory".

One keep-alive HTTP/1.1 connection to a sandbox, driven from the engine's thread.

Hand-held because this is the hot path (docs/performance.md, "Hot path client"): a call is one
scatter-gather send and, mostly, one receive into a buffer that is reused. It speaks only what a
sandbox answers: a status line, headers with a content-length, a body. Over a Unix socket large
frames lie in shared memory instead (sharing.py).

Keep-alive connections to sandboxes.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from faasmoe_contracts.shared_region import (
    FRAME_HEADER,
    MAX_REGION_BYTES,
    REGION_HEADER,
    SharedRegion,
)
from faasmoe_contracts.unix_socket import connect_unix
from faasmoe_contracts.wire import Buffer
from faasmoe_router.dispatch.calls import Call, CallError, ConnectError, StatusError

MIN_SHARED_FRAME_BYTES = 32 << 10
"""Frames of so many bytes and more are shared: docs/performance.md, "Frames in shared memory"."""

MIN_REGION_BYTES = 1 << 20


class SharedMemoryClient:
    """One connection's shared memory.

    Args:
        least_bytes: of a frame that is shared.
    """

    def __init__(self, min_bytes: int = MIN_SHARED_FRAME_BYTES) -> None:
        self._min_bytes = min_bytes
        self._region: SharedRegion | None = None
        self._is_offered = False
        self._is_refused = False

    def write_frame(self, parts: Sequence[memoryview]) -> tuple[str, Sequence[memoryview]]:
        """Put a frame in the memory, offer memory, or do neither.

        Args:
            parts: the frame's bytes.

        Returns:
            The header lines that say where the frame is, and what is to be sent after them.
        """
        size_bytes = sum(len(part) for part in parts)
        length_header = f"content-length: {size_bytes}\r\n"
        self._is_offered = False
        if size_bytes < self._min_bytes or self._is_refused:
            return length_header, parts
        if self._region is not None and 2 * size_bytes <= len(self._region.view):
            _copy_parts(self._region.view, parts)
            return f"content-length: 0\r\n{FRAME_HEADER}: {size_bytes}\r\n", ()
        return length_header + self._offer_region(size_bytes), parts

    def handle_response_headers(self, headers: Mapping[bytes, bytes]) -> None:
        """Take note of what the sandbox says of an offer, by its answer's headers."""
        if not self._is_offered:
            return
        assert self._region is not None
        self._is_offered = False
        self._region.close_descriptor()
        size = headers.get(REGION_HEADER.encode(), b"")
        if size != str(len(self._region.view)).encode():
            self._region, self._is_refused = None, True

    def read_response(self, location: bytes) -> memoryview:
        """Return the answer that lies at `place`, valid until the next call; raises CallError.

        Args:
            place: where it begins and its size, in bytes, in decimal.
        """
        offset, _, length = location.partition(b" ")
        is_valid = self._region is not None and offset.isdigit() and length.isdigit()
        if not is_valid or int(offset) + int(length) > len(self._region.view):  # type: ignore[union-attr]
            raise CallError(
                f"{FRAME_HEADER}: got {location[:40]!r}, expected an offset and length in the shared region"
            )
        assert self._region is not None
        return self._region.view[int(offset) : int(offset) + int(length)]

    def release_pages(self) -> None:
        """Give the memory's pages back until they are used; no call may be in flight."""
        if self._region is not None:
            self._region.release_pages()

    def close(self) -> None:
        """Give the memory back."""
        if self._region is not None:
            self._region.close_descriptor()
            self._region = None

    def _offer_region(self, size_bytes: int) -> str:
        """Return the header line that offers memory for such frames and their answers."""
        region_bytes = max(MIN_REGION_BYTES, 1 << (2 * size_bytes - 1).bit_length())
        self.close()
        if region_bytes > MAX_REGION_BYTES:
            return ""
        try:
            self._region = SharedRegion.create(region_bytes)
        except OSError:  # no memory, no descriptors: frames are sent
            self._is_refused = True
            return ""
        self._is_offered = True
        return f"{REGION_HEADER}: {self._region.descriptor} {region_bytes}\r\n"


def _copy_parts(view: memoryview, parts: Sequence[Buffer]) -> None:
    offset = 0
    for part in parts:
        size_bytes = len(part)
        view[offset : offset + size_bytes] = part
        offset += size_bytes


MAX_HEAD_BYTES = 16 << 10
MAX_RESPONSE_BYTES = 64 << 20  # what a sandbox may send before it is cut off
INITIAL_BUFFER_BYTES = 128 << 10
MAX_IDLE_BUFFER_BYTES = 1 << 20  # a larger one is given back when the connection goes idle
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
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
    ) -> None:
        self.address = address
        self.is_connected = False
        unix_socket = None if socket_dir is None else connect_unix(socket_dir, address)
        self._socket = unix_socket or _start_connecting(address)
        self._shared_memory = None if unix_socket is None else SharedMemoryClient(min_shared_bytes)
        self._shared_location: bytes | None = None  # of an answer that is shared
        self._was_used = False
        self._is_reused = False
        self._is_closing = False
        self._status = 0
        self._unsent: list[memoryview] = []
        self._buffer = bytearray(INITIAL_BUFFER_BYTES)
        self._n_received = 0
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
    def is_unix_socket(self) -> bool:
        """Whether the sandbox is on this machine, with a Unix socket."""
        return self._shared_memory is not None

    @property
    def is_stale(self) -> bool:
        """Whether a failure now may only mean that the sandbox had closed it while idle."""
        return self._is_reused and not self._n_received

    @property
    def is_reusable(self) -> bool:
        """Whether another call may follow the one that was answered."""
        return not self._is_closing and not self._unsent

    def send_request(self, head: bytes, body: Sequence[Buffer]) -> None:
        """Begin a call: send as much as the socket takes; raises CallError.

        Args:
            head: request line and headers, but for those that say where the body is.
            body: its bytes, in parts.
        """
        self._is_reused, self._was_used = self._was_used, True
        self._n_received = self._body_start = self._body_end = 0
        parts: Sequence[memoryview] = [memoryview(part).cast("B") for part in body]
        if self._shared_memory is None:
            header_lines = f"content-length: {sum(len(part) for part in parts)}\r\n"
        else:
            header_lines, parts = self._shared_memory.write_frame(parts)
        request_head = memoryview(head + header_lines.encode() + b"\r\n")
        self._unsent = [request_head, *(part for part in parts if len(part))]
        self.send_pending()

    def send_pending(self) -> None:
        """Send more of the call; raises CallError."""
        while self._unsent:
            try:
                n_sent = self._socket.sendmsg(self._unsent[:IOV_MAX])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._call_error("send", error) from error
            self.is_connected = True
            self._discard_sent(n_sent)

    def receive(self) -> bool:
        """Read what is there; return whether the answer is whole; raises CallError."""
        while True:
            try:
                n_read = self._socket.recv_into(memoryview(self._buffer)[self._n_received :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._call_error("receive", error) from error
            if n_read == 0:
                raise CallError(
                    f"{self.address}: closed after {self._n_received} bytes of a response"
                )
            self._n_received += n_read
            if self._is_complete():
                return True

    def response_body(self) -> memoryview:
        """Return the body of a whole answer, valid until the next call; raises Refused."""
        body = memoryview(self._buffer)[self._body_start : self._body_end]
        if self._status != 200:
            raise StatusError(self._status, bytes(body[:200]).decode("utf-8", "replace"))
        if self._shared_location is not None and self._shared_memory is not None:
            return self._shared_memory.read_response(self._shared_location)
        return body

    def shrink_buffer(self) -> None:
        """Give back what an idle connection need not hold."""
        if len(self._buffer) > MAX_IDLE_BUFFER_BYTES:
            self._buffer = bytearray(INITIAL_BUFFER_BYTES)

    def release_memory(self) -> None:
        """Give back what is kept between calls because they follow each other closely."""
        self._buffer = bytearray(INITIAL_BUFFER_BYTES)
        if self._shared_memory is not None:
            self._shared_memory.release_pages()

    def close(self) -> None:
        """Close the socket, and give back what is shared."""
        self._socket.close()
        if self._shared_memory is not None:
            self._shared_memory.close()

    def _call_error(self, verb: str, error: OSError) -> CallError:
        if not self.is_connected:
            return ConnectError(f"{self.address}: cannot connect: {error}")
        return CallError(f"{self.address}: cannot {verb}: {error}")

    def _discard_sent(self, n_sent: int) -> None:
        while n_sent:
            first = self._unsent[0]
            if n_sent < len(first):
                self._unsent[0] = first[n_sent:]
                return
            n_sent -= len(first)
            del self._unsent[0]

    def _is_complete(self) -> bool:
        if not self._body_end and not self._parse_head():
            if self._n_received > MAX_HEAD_BYTES:
                raise CallError(f"{self.address}: response head exceeds {MAX_HEAD_BYTES} bytes")
            return False
        if self._n_received > self._body_end:
            raise CallError(f"{self.address}: bytes after the end of a response")
        if self._body_end > len(self._buffer):
            self._grow_buffer(self._body_end)
        return self._n_received == self._body_end

    def _grow_buffer(self, size_bytes: int) -> None:
        grown = bytearray(size_bytes)  # a new one: somebody may still hold a view of the old
        grown[: self._n_received] = memoryview(self._buffer)[: self._n_received]
        self._buffer = grown

    def _parse_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, min(self._n_received, MAX_HEAD_BYTES + 4))
        if end < 0:
            return False
        status_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = dict(_parse_header(line) for line in lines)
        length = headers.get(b"content-length", b"")
        version, _, rest = status_line.partition(b" ")
        if version != b"HTTP/1.1" or not rest[:3].isdigit() or not _is_content_length(length):
            raise CallError(f"{self.address}: not an HTTP/1.1 response with a content-length")
        if int(length) > MAX_RESPONSE_BYTES:
            raise CallError(f"{self.address}: response of {int(length)} bytes is too large")
        self._is_closing = headers.get(b"connection", b"").lower() == b"close"
        self._status = int(rest[:3])
        self._shared_location = headers.get(FRAME_HEADER.encode())
        if self._shared_memory is not None:
            self._shared_memory.handle_response_headers(headers)
        self._body_start = end + 4
        self._body_end = self._body_start + int(length)
        return True


def _start_connecting(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        address_infos = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, socket_address = address_infos[0]
        new_socket = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:
        raise ConnectError(f"{address}: cannot connect: {error}") from error
    new_socket.setblocking(False)
    new_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = new_socket.connect_ex(socket_address)
    if code not in (0, errno.EINPROGRESS):
        new_socket.close()
        raise ConnectError(f"{address}: cannot connect: {os.strerror(code)}")
    return new_socket


def _is_content_length(text: bytes) -> bool:
    return text.isdigit() and len(text) <= MAX_LENGTH_DIGITS


def _parse_header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()


MAX_IDLE_PER_ADDRESS = 8


class ConnectionPool:
    """The connections that no call uses. Belongs to one thread, but for `retain` and `rest`.

    Args:
        token: bearer token of the sandboxes.
        socket_dir: where sandboxes of this machine have Unix sockets; None for TCP alone.
        shared_bytes: frames of so many bytes and more are shared with those, not sent.
    """

    def __init__(
        self,
        *,
        token: str = "",
        socket_dir: Path | None = None,
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
    ) -> None:
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._socket_dir = socket_dir
        self._min_shared_bytes = min_shared_bytes
        self._idle: dict[str, list[Connection]] = {}
        self._retained: Collection[str] | None = None  # None: every address
        self._lock = threading.Lock()  # of the two above

    def acquire(self, address: str, *, force_new: bool) -> Connection:
        """Return an idle connection, or a new one; raises CallError."""
        if not force_new:
            with self._lock:
                if idle := self._idle.get(address):
                    return idle.pop()
        return Connection(
            address, socket_dir=self._socket_dir, min_shared_bytes=self._min_shared_bytes
        )

    def request_head(self, call: Call) -> bytes:
        """Return the head of a call's HTTP request, but for what says where its body is."""
        return (
            f"POST /v1/functions/{call.function_id} HTTP/1.1\r\nhost: {call.address}\r\n"
            f"{self._authorization}"
        ).encode()

    def release(self, connection: Connection) -> None:
        """Take a connection back whose answer was read."""
        address = connection.address
        with self._lock:
            is_retained = self._retained is None or address in self._retained
            if is_retained and connection.is_reusable:
                idle = self._idle.setdefault(address, [])
                if len(idle) < MAX_IDLE_PER_ADDRESS:
                    connection.shrink_buffer()
                    idle.append(connection)
                    return
        connection.close()

    def retain(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, those in use once they are answered.

        Their sandboxes are gone. May be called from any thread.
        """
        with self._lock:
            self._retained = addresses
            removed = [self._idle.pop(a) for a in list(self._idle) if a not in addresses]
        for connection in (c for connections in removed for c in connections):
            connection.close()

    def release_memory(self) -> None:
        """Give back memory that idle connections keep for the next calls; from any thread."""
        with self._lock:
            for connection in (c for connections in self._idle.values() for c in connections):
                connection.release_memory()

    def close(self) -> None:
        """Close all idle connections."""
        self.retain(())
