"""Keep-alive connections to sandboxes: a pool, HTTP/1.1 connections, and shared memory.

Knows bytes and sockets; knows nothing of layers or retries. The HTTP client is hand-written because
this is the hot path (docs/performance.md, "Hot path client"): a call is one scatter-gather send
and usually one receive into a reused buffer. It parses only what a sandbox sends: a status line,
headers with a content-length, a body. Sockets are non-blocking and polled by the engine's thread
(fanout.py).

Over a Unix socket, large frames are passed in shared memory. The client offers a region along with
the first large frame, which it still sends, and uses the region once the sandbox has confirmed the
mapping. A sandbox that does not confirm (another version, user or PID namespace) gets all frames
over its socket. See docs/wire.md, "Frames in shared memory".

TCP connections may have TLS (tls_socket.py); Unix sockets, which only the machine's own processes
reach, never do.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.shared_region import (
    FRAME_HEADER,
    MAX_REGION_BYTES,
    REGION_HEADER,
    SharedRegion,
)
from faasmoe_contracts.tls import TlsPeer
from faasmoe_contracts.unix_socket import connect_unix
from faasmoe_contracts.wire import Buffer
from faasmoe_router.dispatch.tls_socket import TlsSocket

MAX_IDLE_PER_ADDRESS = 8
MAX_HEAD_BYTES = 16 << 10
MAX_RESPONSE_BYTES = 64 << 20
INITIAL_BUFFER_BYTES = 128 << 10
MAX_IDLE_BUFFER_BYTES = 1 << 20  # a larger buffer is freed when its connection becomes idle
MAX_LENGTH_DIGITS = 12
IOV_MAX = 64

MIN_SHARED_FRAME_BYTES = 32 << 10
"""Frames of at least this size are shared: docs/performance.md, "Frames in shared memory"."""

MIN_REGION_BYTES = 1 << 20


class CallError(Exception):
    """A call without a usable response: the connection, the sandbox or its response failed."""


class ConnectError(CallError):
    """The address does not accept connections."""


class EndpointStarting(ConnectError):
    """The address does not accept connections and never has: its sandbox may be starting."""


class CallTimeout(CallError):
    """The call exceeded its deadline; no other fault is known."""


class LostHedge(CallError):
    """The same call, started later at another replica, was answered first."""


class NoHealthyEndpoint(CallError):
    """Every address of the function is ejected, so the call was not made."""


class StatusError(CallError):
    """The sandbox responded with a status other than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Call:
    """One frame for one function at one address (host:port)."""

    address: str
    function_id: str
    frame: Sequence[Buffer]

    @property
    def size_bytes(self) -> int:
        """Size of the frame in bytes."""
        return sum(memoryview(part).nbytes for part in self.frame)

    def with_address(self, address: str) -> Call:
        """Return the same call for another address."""
        return Call(address, self.function_id, self.frame)


class ConnectionPool:
    """Idle connections, and the request heads that they send.

    Belongs to one thread, except for `retain` and `release_memory`.

    Args:
        token: bearer token of the sandboxes.
        socket_dir: folder of the Unix sockets of sandboxes on this machine; None for TCP only.
        min_shared_bytes: minimum size of frames that are passed in shared memory.
        tls: how sandboxes are known over TCP; None calls them without TLS.
    """

    def __init__(
        self,
        *,
        token: str = "",
        socket_dir: Path | None = None,
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
        tls: TlsPeer | None = None,
    ) -> None:
        self._tls = tls
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._socket_dir = socket_dir
        self._min_shared_bytes = min_shared_bytes
        self._idle: dict[str, list[Connection]] = {}
        self._retained: Collection[str] | None = None  # None: every address
        self._lock = threading.Lock()  # guards the two above

    def acquire(self, address: str, *, force_new: bool) -> Connection:
        """Return an idle connection, or a new one; raises CallError."""
        if not force_new:
            with self._lock:
                if idle := self._idle.get(address):
                    return idle.pop()
        return Connection(
            address,
            socket_dir=self._socket_dir,
            min_shared_bytes=self._min_shared_bytes,
            tls=self._tls,
        )

    def request_head(self, call: Call) -> bytes:
        """Return the head of a call's HTTP request, without the headers that locate its body."""
        return (
            f"POST /v1/functions/{call.function_id} HTTP/1.1\r\nhost: {call.address}\r\n"
            f"{self._authorization}"
        ).encode()

    def release(self, connection: Connection) -> None:
        """Return a connection to the pool after its response was read."""
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
        """Close connections to all other addresses, those in use once they are released.

        Safe from any thread.
        """
        with self._lock:
            self._retained = addresses
            removed = [self._idle.pop(a) for a in list(self._idle) if a not in addresses]
        for connection in (c for connections in removed for c in connections):
            connection.close()

    def release_memory(self) -> None:
        """Free the memory that idle connections keep for their next calls; safe from any thread."""
        with self._lock:
            for connection in (c for connections in self._idle.values() for c in connections):
                connection.release_memory()

    def close(self) -> None:
        """Close all idle connections."""
        self.retain(())


class Connection:
    """A socket with at most one call in flight.

    Args:
        address: host:port.
        socket_dir: folder of the Unix sockets of sandboxes on this machine; None for TCP only.
        min_shared_bytes: minimum size of frames that are passed in shared memory.
        tls: how the sandbox is known over TCP; None connects without TLS.

    Attributes:
        address: host:port.
        is_connected: whether the sandbox has accepted the connection; sending starts before that
            is known.
    """

    def __init__(
        self,
        address: str,
        *,
        socket_dir: Path | None = None,
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
        tls: TlsPeer | None = None,
    ) -> None:
        self.address = address
        self.is_connected = False
        unix_socket = None if socket_dir is None else connect_unix(socket_dir, address)
        self._socket: socket.socket | TlsSocket = unix_socket or _start_connecting(address)
        self._tls: TlsSocket | None = None
        if unix_socket is None and tls is not None:
            self._socket = self._tls = TlsSocket(self._socket, tls)
        self._shared_memory = None if unix_socket is None else SharedMemoryClient(min_shared_bytes)
        self._shared_location: bytes | None = None  # of a response in shared memory
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
        """Return the file descriptor, for `poll`."""
        return self._socket.fileno()

    @property
    def events(self) -> int:
        """Events to poll for: reading, and writing while part of the request can be sent."""
        can_send = bool(self._unsent)
        if self._tls is not None:  # during a handshake the request waits for the sandbox
            can_send = self._tls.has_unsent or (can_send and self._tls.is_secure)
        return select.POLLIN | (select.POLLOUT if can_send else 0)

    @property
    def has_unsent(self) -> bool:
        """Whether part of the request is unsent."""
        return bool(self._unsent) or (self._tls is not None and self._tls.has_unsent)

    @property
    def is_unix_socket(self) -> bool:
        """Whether the connection is a Unix socket, so the sandbox is on this machine."""
        return self._shared_memory is not None

    @property
    def is_stale(self) -> bool:
        """Whether a failure may only mean that the sandbox had closed the idle connection."""
        return self._is_reused and not self._n_received

    @property
    def is_reusable(self) -> bool:
        """Whether the connection can carry another call after a complete response."""
        return not self._is_closing and not self.has_unsent

    def send_request(self, head: bytes, body: Sequence[Buffer]) -> None:
        """Start a call: send as much as the socket accepts; raises CallError.

        Args:
            head: request line and headers, without those that locate the body.
            body: the body's bytes, in parts.
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
        """Send more of the request; raises CallError."""
        while self._unsent:
            try:
                n_sent = self._socket.sendmsg(self._unsent[:IOV_MAX])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._call_error("send", error) from error
            self.is_connected = True
            self._discard_sent(n_sent)
        if self._tls is not None and self._tls.has_unsent:
            self._flush(self._tls)

    def _flush(self, tls: TlsSocket) -> None:
        try:
            tls.flush()
        except BlockingIOError:
            return
        except OSError as error:
            raise self._call_error("send", error) from error

    def receive(self) -> bool:
        """Read the available bytes; return whether the response is complete; raises CallError."""
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
                    f"{self._hint_of_refusal()}"
                )
            self._n_received += n_read
            if self._is_complete():
                return True

    def response_body(self) -> memoryview:
        """Return the body of a complete response, valid until the next call.

        Raises:
            StatusError: the status is not 200.
            CallError: the body's location in shared memory is invalid.
        """
        body = memoryview(self._buffer)[self._body_start : self._body_end]
        if self._status != 200:
            raise StatusError(self._status, bytes(body[:200]).decode("utf-8", "replace"))
        if self._shared_location is not None and self._shared_memory is not None:
            return self._shared_memory.read_response(self._shared_location)
        return body

    def shrink_buffer(self) -> None:
        """Replace a large receive buffer, as the connection becomes idle."""
        if len(self._buffer) > MAX_IDLE_BUFFER_BYTES:
            self._buffer = bytearray(INITIAL_BUFFER_BYTES)

    def release_memory(self) -> None:
        """Free the buffers that are kept between calls; no call may be in flight."""
        self._buffer = bytearray(INITIAL_BUFFER_BYTES)
        if self._shared_memory is not None:
            self._shared_memory.release_pages()

    def close(self) -> None:
        """Close the socket and release the shared memory."""
        self._socket.close()
        if self._shared_memory is not None:
            self._shared_memory.close()

    def _call_error(self, verb: str, error: OSError) -> CallError:
        if not self.is_connected:
            return ConnectError(f"{self.address}: cannot connect: {error}")
        return CallError(f"{self.address}: cannot {verb}: {error}{self._hint_of_refusal()}")

    def _hint_of_refusal(self) -> str:
        # A TLS 1.3 client learns only after its request whether its own certificate was accepted,
        # and uvloop's servers close without an alert.
        if self._tls is None or self._is_reused or self._n_received:
            return ""
        return "; with TLS, perhaps as it does not accept this router's certificate"

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
        grown = bytearray(size_bytes)  # not resized: a view of the old one may still exist
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


class SharedMemoryClient:
    """One connection's shared memory region.

    Args:
        min_bytes: minimum size of frames that are shared.
    """

    def __init__(self, min_bytes: int = MIN_SHARED_FRAME_BYTES) -> None:
        self._min_bytes = min_bytes
        self._region: SharedRegion | None = None
        self._is_offered = False
        self._is_refused = False

    def write_frame(self, parts: Sequence[memoryview]) -> tuple[str, Sequence[memoryview]]:
        """Write a frame to the region if possible, or offer a region if the frame is large.

        Args:
            parts: the frame's bytes.

        Returns:
            The header lines that locate the frame, and the body parts to send after them.
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
        """Read from the response headers whether the sandbox accepted an offered region."""
        if not self._is_offered:
            return
        assert self._region is not None
        self._is_offered = False
        self._region.close_descriptor()
        size = headers.get(REGION_HEADER.encode(), b"")
        if size != str(len(self._region.view)).encode():
            self._region, self._is_refused = None, True

    def read_response(self, location: bytes) -> memoryview:
        """Return the response at `location`, valid until the next call; raises CallError.

        Args:
            location: offset and length in the region, decimal bytes separated by a space.
        """
        offset, _, length = location.partition(b" ")
        is_valid = self._region is not None and offset.isdigit() and length.isdigit()
        if not is_valid or int(offset) + int(length) > len(self._region.view):  # type: ignore[union-attr]
            raise CallError(
                f"{FRAME_HEADER}: got {location[:40]!r}, "
                "expected an offset and length in the shared region"
            )
        assert self._region is not None
        return self._region.view[int(offset) : int(offset) + int(length)]

    def release_pages(self) -> None:
        """Release the region's pages until their next use; no call may be in flight."""
        if self._region is not None:
            self._region.release_pages()

    def close(self) -> None:
        """Release the region."""
        if self._region is not None:
            self._region.close_descriptor()
            self._region = None

    def _offer_region(self, size_bytes: int) -> str:
        """Create a region for such frames and their responses; return the offering header line."""
        region_bytes = max(MIN_REGION_BYTES, 1 << (2 * size_bytes - 1).bit_length())
        self.close()
        if region_bytes > MAX_REGION_BYTES:
            return ""
        try:
            self._region = SharedRegion.create(region_bytes)
        except OSError:  # out of memory or descriptors: fall back to the socket
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
