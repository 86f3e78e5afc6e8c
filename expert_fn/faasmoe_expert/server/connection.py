"""One client connection of a sandbox: HTTP/1.1 with pipelining, timeouts and shared memory.

Frames are computed in the event loop's thread, one after the other: a sandbox has its cores for one
frame at a time, so a thread pool would only add hops. A response may be a future while a function
is attached or frames are batched; later requests of the connection wait for it. Limits on head and
body are in `http`. A malformed request closes its connection, never the sandbox.

A client on the same machine may offer a shared memory region in a request. If the response confirms
it, later frames may be passed in the region: the request at its beginning, the response after it.
Frames that do not fit are sent inline. See docs/wire.md, "Frames in shared memory".
"""

from __future__ import annotations

import asyncio
import functools
import logging
from asyncio import Future
from collections import deque
from collections.abc import Callable, Hashable, Set
from dataclasses import replace
from typing import cast

from faasmoe_contracts.shared_region import (
    FRAME_HEADER,
    MAX_REGION_BYTES,
    REGION_HEADER,
    SharedRegion,
)
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.tls import is_named
from faasmoe_contracts.unix_socket import peer_pid
from faasmoe_contracts.wire import MAX_FRAME_BYTES
from faasmoe_expert.config import (
    IDLE_TIMEOUT_S,
    MAX_BODIES_BYTES,
    MAX_CONNECTIONS,
    MAX_FRAMES,
)
from faasmoe_expert.errors import BadFrame
from faasmoe_expert.server.http import (
    HeldResource,
    HttpRequest,
    HttpRequestReader,
    HttpResponse,
    ReadLimits,
    RequestHandler,
)

logger = logging.getLogger(__name__)

FRAME_ALIGNMENT_BYTES = 64
MAX_DIGITS = 10  # of a number in a shared-memory header


class HttpConnection(asyncio.Protocol):
    """One client connection.

    Args:
        handle: computes responses.
        connections: the server's open connections; this one adds and removes itself.
        timeout_s: time to read a complete request, and for the client to read responses.
        idle_timeout_s: time after which a connection without requests is closed.
        max_connections: number of open connections above which new ones are rejected.
        read_limits: limits shared by all connections.
        is_authorized: whether an `Authorization` header is that of a peer. Connections of others
            are closed, the oldest first, when there is no place for a new one.
        peers: names of which certificates of clients over TLS must have one, for anything but
            probes; clients without TLS need none, as they come over the Unix socket, or there is no
            TLS.

    Attributes:
        closed: resolved when the connection is lost.
        peer_pid: process ID of the client if it is a Unix socket, else None.
    """

    closed: asyncio.Future[None]

    def __init__(
        self,
        handle: RequestHandler,
        connections: set[HttpConnection],
        *,
        timeout_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        read_limits: ReadLimits | None = None,
        is_authorized: Callable[[bytes], bool] = lambda _: True,
        peers: Set[str] = frozenset(),
    ) -> None:
        self._peers = peers
        self._is_known = False  # has sent a peer's request
        self._handle = handle
        self._connections = connections
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._max_connections = max_connections
        read_limits = read_limits or ReadLimits(max_frames=MAX_FRAMES, max_bytes=MAX_BODIES_BYTES)
        self._request_reader = HttpRequestReader(
            read_limits,
            on_request_start=self._on_request_start,
            on_request=self._on_request,
            is_authorized=is_authorized,
        )
        self._idle_timer: asyncio.TimerHandle | None = None  # see _close_if_idle
        self._read_timer: asyncio.TimerHandle | None = None  # until the request is complete
        self._write_timer: asyncio.TimerHandle | None = None  # until the client reads responses
        self._shared_memory: SharedMemoryChannel | None = None
        self._held: HeldResource | None = None
        self.peer_pid: int | None = None
        self._queue: deque[tuple[HttpRequest, bool]] = deque()  # unanswered, with keep_alive
        self._pending_response: Future[HttpResponse] | None = None
        self._is_write_paused = False
        self._rejection: HttpResponse | None = None  # sent after the pending response
        self._is_closing = False  # close once the pending response is sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection; rejects it if there are too many."""
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, transport)
        self.closed = self._loop.create_future()
        self._sender = sender_identity(self._transport)
        if (tls := self._transport.get_extra_info("ssl_object")) is not None:
            self._request_reader.is_trusted = is_named(tls, self._peers)
        self.peer_pid = peer_pid(self._transport.get_extra_info("socket"))
        self._last_used_s = self._loop.time()
        self._connections.add(self)
        if len(self._connections) > self._max_connections and not self._close_unknown():
            message = f"connections: got one more than the {self._max_connections} allowed"
            self._write_response(
                HttpResponse.error_response(503, "too_many_connections", message), keep_alive=False
            )
            return
        self._idle_timer = self._loop.call_later(self._idle_timeout_s, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that belongs to the connection."""
        self._connections.discard(self)
        self._request_reader.close()
        if self._held is not None:
            self._held.close()
            self._held = None
        for request, _ in self._queue:
            self._request_reader.release(request)
        self._cancel_read_timer()
        self._cancel_write_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Parse requests and answer complete ones."""
        rejection = self._request_reader.feed(data)
        if rejection is not None:
            self._reject(rejection)

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its responses; abort after `timeout_s`."""
        self._is_write_paused = True
        self._update_reading()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """Resume reading."""
        self._is_write_paused = False
        if not self._transport.is_closing():
            self._cancel_write_timer()
            self._update_reading()

    def hold(self, resource: HeldResource) -> None:
        """Close a resource with the connection, in place of an earlier one."""
        if self._held is not None:
            self._held.close()
        self._held = resource

    def close_held(self) -> None:
        """Close the resource, if there is one, and with it the connection, which serves only it."""
        if self._held is None:
            return
        self._held.close()
        self._held = None
        self.close()

    def close(self) -> None:
        """Close the connection after the pending response, once written data is sent."""
        self._is_closing = True
        if self._pending_response is not None:
            return
        self._transport.close()
        self._start_write_timer()

    def abort(self) -> None:
        """Close the connection immediately, discarding unsent data."""
        self._transport.abort()

    def _close_unknown(self) -> bool:
        """Close the least recently used connection that no peer uses; return whether there is."""
        unknown = [
            connection
            for connection in self._connections
            if not connection._is_known
            and connection is not self
            and connection._pending_response is None
        ]
        if not unknown:
            return False
        oldest = min(unknown, key=lambda connection: connection._last_used_s)
        self._connections.discard(oldest)
        oldest.abort()
        return True

    def _on_request_start(self) -> None:
        """Start the timeout for the complete request."""
        self._read_timer = self._loop.call_later(self._timeout_s, self._on_read_timeout)

    def _on_request(self, request: HttpRequest, keep_alive: bool) -> None:
        """Queue a complete request and answer what can be answered."""
        self._cancel_read_timer()
        if self._transport.is_closing():
            self._request_reader.release(request)
            return
        self._is_known = self._is_known or self._request_reader.is_peer
        request.sender, request.connection = self._sender, self
        self._queue.append((request, keep_alive))
        self._handle_queued()

    def _handle_queued(self) -> None:
        """Answer queued requests in order, up to the first one whose response is pending."""
        while self._queue and self._pending_response is None and not self._transport.is_closing():
            request, keep_alive = self._queue.popleft()
            response = self._handle_request(request)
            if isinstance(response, HttpResponse):
                self._finish_request(request, response, keep_alive=keep_alive)
            else:
                self._pending_response = response
                on_response = functools.partial(self._on_response, request, keep_alive=keep_alive)
                response.add_done_callback(on_response)
                self._update_reading()

    def _on_response(
        self, request: HttpRequest, future: Future[HttpResponse], *, keep_alive: bool
    ) -> None:
        self._pending_response = None
        if future.cancelled() or self._transport.is_closing():  # shutdown or lost
            self._request_reader.release(request)
            return
        self._finish_request(
            request, future.result(), keep_alive=keep_alive and not self._is_closing
        )
        self._handle_queued()
        if self._rejection is not None and self._pending_response is None:
            self._write_response(self._rejection, keep_alive=False)
        self._update_reading()

    def _finish_request(
        self, request: HttpRequest, response: HttpResponse, *, keep_alive: bool
    ) -> None:
        self._request_reader.release(request)
        response = self._write_to_shared_memory(request, response)
        self._write_response(response, keep_alive=keep_alive, is_head=request.method == "HEAD")
        self._last_used_s = self._loop.time()

    def _update_reading(self) -> None:
        if self._transport.is_closing():
            return
        if self._pending_response is not None or self._is_write_paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _handle_request(self, request: HttpRequest) -> HttpResponse | Future[HttpResponse]:
        frame_header, region_header = request.frame_header, request.region_header
        if frame_header is None and region_header is None:
            return self._handle(request)
        if self._shared_memory is None:
            self._shared_memory = SharedMemoryChannel(self.peer_pid)
        if frame_header is not None:
            try:
                request.shared_frame = self._shared_memory.read_frame(frame_header)
            except BadFrame as error:
                return HttpResponse.json_response(error.status, error.to_json())
        return self._handle(request)

    def _write_to_shared_memory(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """Write the response frame to shared memory if possible, or map an offered region."""
        if self._shared_memory is None:
            return response
        if request.shared_frame is not None:
            return self._shared_memory.write_response(response, len(request.shared_frame))
        if request.region_header is not None:
            return self._shared_memory.map_region(request.region_header, response)
        return response

    def _write_response(
        self, response: HttpResponse, *, keep_alive: bool, is_head: bool = False
    ) -> None:
        stays_open = keep_alive and not response.close
        if self._transport.is_closing():
            return
        body = () if is_head else response.body
        self._transport.writelines([response.encode_head(keep_alive=stays_open), *body])
        if not stays_open:
            self.close()

    def _reject(self, response: HttpResponse) -> None:
        self._cancel_read_timer()
        if self._pending_response is not None:
            self._rejection = response
            return
        self._write_response(response, keep_alive=False)

    def _on_read_timeout(self) -> None:
        message = (
            f"request: got an incomplete request after {self._timeout_s:g} s, "
            "expected a complete one"
        )
        self._reject(HttpResponse.error_response(408, "request_timeout", message))

    def _close_if_idle(self) -> None:
        """Close an unused connection; checked by one timer, so that requests need none."""
        remaining_s = self._last_used_s + self._idle_timeout_s - self._loop.time()
        is_busy = self._request_reader.is_reading or self._pending_response is not None
        is_busy = is_busy or (self._held is not None and self._held.was_used())
        if is_busy:
            remaining_s = self._idle_timeout_s
        if remaining_s > 0:
            self._idle_timer = self._loop.call_later(remaining_s, self._close_if_idle)
        else:
            self.close()

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self._loop.call_later(self._timeout_s, self._transport.abort)


def sender_identity(transport: asyncio.Transport) -> Hashable:
    """Return the client's process ID for Unix sockets, its host for TCP, None if unknown."""
    pid = peer_pid(transport.get_extra_info("socket"))
    name = transport.get_extra_info("peername")
    return pid if pid is not None else name[0] if name else None


class SharedMemoryChannel:
    """The shared memory region of one connection.

    Args:
        client_pid: process ID of the client; None if unknown, then regions are ignored.
    """

    def __init__(self, client_pid: int | None) -> None:
        self._client_pid = client_pid
        self._region: SharedRegion | None = None

    def map_region(self, region_header: bytes, response: HttpResponse) -> HttpResponse:
        """Map a region that a request offers, replacing the previous one.

        Args:
            region_header: descriptor and size in bytes, in decimal.
            response: response to the request; the offer is ignored unless its status is 200.

        Returns:
            `response`, with a header that confirms the region if it was mapped.
        """
        if self._client_pid is None or response.status != 200:
            return response
        self._region = None
        try:
            descriptor, size_bytes = _parse_integers(region_header, 2)
            if not 0 < size_bytes <= MAX_REGION_BYTES:
                raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_REGION_BYTES}")
            self._region = SharedRegion.open(self._client_pid, descriptor, size_bytes)
        except (OSError, ValueError) as error:
            logger.info("%s: region rejected, sending frames inline: %s", REGION_HEADER, error)
            return response
        return replace(response, headers=f"{REGION_HEADER}: {size_bytes}\r\n")

    def read_frame(self, frame_header: bytes) -> memoryview:
        """Return a view of the request frame at the beginning of the region.

        Args:
            frame_header: size of the frame in bytes, in decimal.

        Raises:
            BadFrame: the header is malformed, or the frame does not fit in the region.
        """
        size_bytes = 0 if self._region is None else len(self._region.view)
        try:
            (length,) = _parse_integers(frame_header, 1)
        except ValueError as error:
            raise BadFrame(f"{FRAME_HEADER}: {error}", field=FRAME_HEADER) from error
        if self._region is None or length > min(size_bytes, MAX_FRAME_BYTES):
            raise BadFrame(
                f"{FRAME_HEADER}: got {length} bytes, expected at most the {size_bytes} shared on "
                "this connection",
                field=FRAME_HEADER,
            )
        return self._region.view[:length]

    def write_response(self, response: HttpResponse, request_bytes: int) -> HttpResponse:
        """Write a response frame to the region, after the request frame.

        Args:
            response: the response.
            request_bytes: size of the request frame in bytes.

        Returns:
            A response without body that locates the frame; `response` itself if it does not fit.
        """
        start = -(-request_bytes // FRAME_ALIGNMENT_BYTES) * FRAME_ALIGNMENT_BYTES
        parts = [memoryview(part).cast("B") for part in response.body]
        length = sum(len(part) for part in parts)
        if self._region is None or response.status != 200:
            return response
        if start + length > len(self._region.view):
            return response
        offset = start
        for part in parts:
            self._region.view[offset : offset + len(part)] = part
            offset += len(part)
        return replace(response, body=(), headers=f"{FRAME_HEADER}: {start} {length}\r\n")


def _parse_integers(text: bytes, n: int) -> list[int]:
    """Parse `n` decimal numbers separated by spaces; raises ValueError."""
    parts = text.split()
    if len(parts) != n or not all(p.isdigit() and len(p) <= MAX_DIGITS for p in parts):
        raise ValueError(f"got {short_repr(text.decode('latin-1'))}, expected {n} decimal numbers")
    return [int(part) for part in parts]
