"""One client connection of a gateway or router: uvicorn's HTTP/1.1 protocol, bounded.

uvicorn bounds neither heads nor the time that a client takes. This protocol does, before anything
of a request reaches the app: 431 beyond 64 KiB of head, 408 after the deadline of a head or a body,
400 for what proxies and servers understand differently (no `Host`, transfer codings other than
`chunked`). Which connections are kept is decided in `connections`.

A client may close its half of a connection and still wait for its answer. Nothing but a write tells
it from one that has left: an interim response, 100, or a comment in a stream, is what the client's
system answers with a reset if nobody reads there any more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from faasmoe_contracts.stream_records import PREPARED_STATUS
from faasmoe_contracts.tls import peer_names
from faasmoe_gateway.connections import KNOWN_CLIENT_EXTENSION, ConnectionLimits, ConnectionTable
from faasmoe_gateway.errors import error_body

MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 64  # requests that wait for the answer before theirs; then the connection ends
MAX_FRAMING_FACTOR = 8  # of chunks of one byte each
LINGER_S = 2.0  # in which a client may read the response to a body that it has not sent to its end
INTERIM_RESPONSE = b"HTTP/1.1 100 Continue\r\n\r\n"
PREPARED_RESPONSE = b"HTTP/1.1 %d Processing\r\n\r\n" % PREPARED_STATUS
PREPARED_EXTENSION = "faasmoe.prepared"  # of the ASGI scope: tells a front that work is prepared
PEER_NAMES_EXTENSION = "faasmoe.peer_names"  # with TLS: the names of the client's certificate
COMMENT_CHUNK = b"b\r\n: waiting\n\n\r\n"  # of an event stream, between two events
PROBE_DELAYS_S = (0.0, 1.0, 4.0, 16.0)  # between interim responses; some clients accept five
PROBE_RESULT_S = 0.05
TCP_CLOSE = 7  # state of a connection that was reset

_connection_logger = logging.getLogger(__name__)
_connection_logger.setLevel(logging.ERROR)  # strangers could fill a log with warnings


class BoundedHttpProtocol(HttpToolsProtocol):
    """One client connection.

    Args:
        limits: sizes and deadlines.
        table: the open connections of the server.
        uvicorn_arguments: what uvicorn creates its protocols with.
    """

    def __init__(
        self, *, limits: ConnectionLimits, table: ConnectionTable, **uvicorn_arguments: Any
    ) -> None:
        super().__init__(**uvicorn_arguments)
        self.logger = _connection_logger
        self._limits = limits
        self._table = table
        self._is_reading_head = True
        self._is_message_complete = True
        self._is_rejected = False
        self._running_cycle: RequestResponseCycle | None = None  # the one that is being answered
        self._has_cycle = False  # `cycle` is that of the message being read
        self._last_cycle: RequestResponseCycle | None = None  # its request is still being sent
        self._head_bytes = 0  # of header names and values
        self._fed_bytes = 0  # since the message began
        self._body_bytes = 0
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection; refuses it if there is no place."""
        super().connection_made(transport)
        self._tls_extensions: dict[str, Any] = {}
        if (tls := transport.get_extra_info("ssl_object")) is not None:
            self._tls_extensions = {PEER_NAMES_EXTENSION: peer_names(tls)}
        address = "" if self.client is None else self.client[0]
        has_place, victim = self._table.admit(self, address)
        if isinstance(victim, BoundedHttpProtocol):
            victim.transport.abort()
        if not has_place:
            self._reject(503, "too_many_connections", "There are too many connections.")
            return
        self._start_read_timer(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that belongs to the connection."""
        self._table.remove(self)
        for timer in (self._read_timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)  # which tells only the request that was read last
        for cycle in (self._running_cycle, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection whose client waits for an answer; close any other.

        A TLS connection has no half that could stay open.
        """
        if self._tls_extensions:
            return False
        if not self._is_answering or not self._is_message_complete or self._is_rejected:
            return False
        for cycle in (self.cycle, *(cycle for cycle, _ in self.pipeline)):
            cycle.keep_alive = False
        self._probe(0)
        return True

    def data_received(self, data: bytes) -> None:
        """Parse requests within the limits."""
        if self._is_rejected or self.parser is None:
            return
        self._fed_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            if self._offers_upgrade:
                self._read_without_upgrade(data[upgrade.args[0] :])
        if self._is_rejected or self.parser is None:
            return
        if self._is_message_complete:
            self._ensure_timer()
            return
        unexplained = self._fed_bytes - (0 if self._is_reading_head else self._body_bytes)
        allowed = MAX_HEAD_BYTES
        if not self._is_reading_head:
            allowed += MAX_HEAD_BYTES + MAX_FRAMING_FACTOR * self._body_bytes
        if unexplained > allowed:
            self._reject_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the shape of all errors."""
        if not self._is_rejected:
            self._reject(400, "invalid_request", msg)

    def on_message_begin(self) -> None:
        """Start counting a request."""
        super().on_message_begin()
        self._is_reading_head, self._is_message_complete, self._has_cycle = True, False, False
        self._head_bytes = self._body_bytes = 0
        self._start_read_timer(self._limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header, or a trailer."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes + len(self.url) > MAX_HEAD_BYTES:
            self._reject_head()
            raise httptools.HttpParserError("the head is too large")
        if self._is_reading_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start answering, unless the head is refused."""
        self._is_reading_head = False
        if self._offers_upgrade:
            return
        if self._is_rejected or not self._check_head():
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._reject(503, "too_many_requests", "Too many requests wait on this connection.")
            raise httptools.HttpParserError("nothing more is read")
        self._start_read_timer(self._limits.body_timeout_s)
        self._table.set_busy(self, is_busy=True)
        extensions: dict[str, Any] = {
            KNOWN_CLIENT_EXTENSION: self.mark_known,
            PREPARED_EXTENSION: partial(self._tell_prepared, self.scope),
            **self._tls_extensions,
        }
        self.scope["extensions"] = extensions
        super().on_headers_complete()
        self._has_cycle = True
        self.cycle.transport = cast(asyncio.Transport, _CycleTransport(self, self.cycle))

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body."""
        self._body_bytes += len(body)
        if not self._is_rejected:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass on the end of the request."""
        if self._offers_upgrade:
            return
        self._is_message_complete = True
        self._fed_bytes = 0
        self._cancel_read_timer()
        if not self._is_rejected:
            super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:
            self._table.set_busy(self, is_busy=False)
            if self.cycle is self._last_cycle:
                self.transport.close()

    def on_response_complete(self) -> None:
        """Go on with the next request, or end a connection whose client still sends this one."""
        super().on_response_complete()
        if not self._is_answering:
            self._table.set_busy(self, is_busy=False)
        if not self._is_message_complete:
            self._unset_keepalive_if_required()
            self._start_read_timer(LINGER_S)

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """Close the connection after a response, once its request was sent to its end.

        A system answers with a reset what it receives on a closed connection, and a client that
        still sends its request would lose the response.
        """
        is_being_sent = cycle is self.cycle and not self._is_message_complete
        if is_being_sent and cycle.response_complete and not self._is_rejected:
            self._last_cycle = cycle
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Stop writing to a client that does not read; end it after a while."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def mark_known(self) -> None:
        """Record that this connection's client has shown a key."""
        self._table.set_known(self)

    def _tell_prepared(self, scope: Any) -> None:
        """Send the interim response for a request's own scope, if its answer has not begun."""
        cycle = self._running_cycle
        is_next = cycle is not None and cycle.scope is scope and not cycle.response_started
        if is_next and not self.transport.is_closing():
            self.transport.write(PREPARED_RESPONSE)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _offers_upgrade(self) -> bool:
        """Whether the client offers a protocol that is not spoken here for what follows the head.

        Java's client offers HTTP/2 with its first request, body and all.
        """
        return bool(self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT")

    def _read_without_upgrade(self, rest: bytes) -> None:
        """Read a request again as if its client had offered nothing, then what follows its head.

        The parser would take the body for the other protocol.
        """
        version = self.parser.get_http_version().encode()
        begin = b" ".join((self.parser.get_method(), self.url, b"HTTP/" + version))
        lines = [name + b": " + value for name, value in _without_upgrade(self.headers)]
        self._fed_bytes -= len(rest)  # counted again
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(b"\r\n".join((begin, *lines, b"", b"")) + rest)

    def _check_head(self) -> bool:
        """Return whether all servers understand a head alike; refuses it otherwise."""
        fields: dict[bytes, list[bytes]] = {}
        for name, value in self.headers:
            fields.setdefault(name, []).append(value.strip().lower())
        is_http_1_1 = self.parser.get_http_version() == "1.1"
        n_hosts = len(fields.get(b"host", ()))
        if n_hosts > 1 or (is_http_1_1 and not n_hosts):
            self._reject(400, "invalid_request", f"Host: got {n_hosts}, expected one.")
            return False
        codings = fields.get(b"transfer-encoding", [])
        if codings and (codings != [b"chunked"] or b"content-length" in fields or not is_http_1_1):
            message = "Transfer-Encoding: expected chunked alone, without Content-Length."
            self._reject(400, "invalid_request", message)
            return False
        return True

    def _reject_head(self) -> None:
        message = f"The request's head is too large: expected at most {MAX_HEAD_BYTES} bytes."
        self._reject(431, "request_headers_too_large", message)

    def _reject(self, status: int, code: str, message: str) -> None:
        """End the connection with an error, unless an answer is being written to it."""
        self._is_rejected = True
        self._cancel_read_timer()
        if self._is_answering and (self.cycle.response_started or not self._has_cycle):
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        self.transport.write(_error_response(status, code, message))
        self.transport.close()

    def _ensure_timer(self) -> None:
        """Start a timer if none runs, as after line ends that begin no request."""
        if self._is_answering or self.transport.is_closing():
            return
        if self._read_timer is None and self.timeout_keep_alive_task is None:
            self._start_read_timer(self._limits.head_timeout_s)

    def _start_read_timer(self, timeout_s: float) -> None:
        self._cancel_read_timer()
        self._read_timer = self.loop.call_later(timeout_s, self._on_read_timeout)

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _on_read_timeout(self) -> None:
        if self._is_message_complete or (self.cycle is not None and self.cycle.response_complete):
            self.transport.close()  # nothing was asked, or it is answered
            return
        part = "head" if self._is_reading_head else "body"
        self._reject(408, "request_timeout", f"The request's {part} was not sent in time.")

    def _probe(self, index: int) -> None:
        """Find out whether the client that has closed its half is still there."""
        if not self._is_answering or self.transport.is_closing():
            return
        is_http_1_1 = self.cycle.scope["http_version"] == "1.1"
        if not self.cycle.response_started and is_http_1_1:
            self.transport.write(INTERIM_RESPONSE)
        elif self.cycle.response_started and self.cycle.chunked_encoding:
            self.transport.write(COMMENT_CHUNK)  # only event streams have no length
        self._probe_timer = self.loop.call_later(PROBE_RESULT_S, self._end_probe, index)

    def _end_probe(self, index: int) -> None:
        if self.transport.is_closing() or not self._is_answering:
            return
        if _is_reset(self.transport):
            self.transport.abort()
        elif index + 1 < len(PROBE_DELAYS_S):
            delay_s = PROBE_DELAYS_S[index + 1]
            self._probe_timer = self.loop.call_later(delay_s, self._probe, index + 1)


class _CycleTransport:
    """The transport that a request's answer is written to.

    Args:
        protocol: the connection.
        cycle: the request.
    """

    def __init__(self, protocol: BoundedHttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        """Close the connection once the client may read the answer."""
        self._protocol.close_after(self._cycle)


def bounded_protocol(limits: ConnectionLimits) -> Callable[..., BoundedHttpProtocol]:
    """Return what uvicorn creates its protocols with; all share one table of connections."""
    table = ConnectionTable(limits)

    def create(**uvicorn_arguments: Any) -> BoundedHttpProtocol:
        return BoundedHttpProtocol(limits=limits, table=table, **uvicorn_arguments)

    return create


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request without those that offer another protocol."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            options = [option.strip() for option in value.split(b",")]
            offers = (b"upgrade", b"http2-settings")
            value = b", ".join(option for option in options if option.lower() not in offers)
        if name not in (b"upgrade", b"http2-settings") and (name != b"connection" or value):
            kept.append((name, value))
    return kept


def _is_reset(transport: asyncio.Transport) -> bool:
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        info: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    except OSError:
        return True
    return info[0] == TCP_CLOSE


def _error_response(status: int, code: str, message: str) -> bytes:
    body = error_body(message, status=status, code=code)
    retry = b"retry-after: 1\r\n" if status == 503 else b""
    return (
        STATUS_LINE[status]
        + b"content-type: application/json\r\nconnection: close\r\n"
        + retry
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
