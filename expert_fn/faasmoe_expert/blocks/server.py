"""HTTP server of a store's blocks, for sandboxes on nodes that do not have the store.

    GET /v1/blocks/DIGEST                 the bytes of a block, in the order of its digest
    GET /v1/stores/DIGEST/files/NAME      a file of the store with this manifest digest, or a range
    GET /healthz

`/v1` needs the bearer token. Connections and bytes per second are bounded; a connection too many is
answered with 503, or closed with TLS. Each connection has a thread, which hands the file to the
kernel (`sendfile`), so that bytes do not pass through Python; with TLS they do. Clients verify what
they get.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence, Set
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO
from urllib.parse import unquote

from faasmoe_contracts.text import short_repr
from faasmoe_contracts.tls import TlsFolder, is_named
from faasmoe_expert.blocks.index import BlockIndex, FileRange
from faasmoe_expert.blocks.rate_limit import ByteRateLimiter

logger = logging.getLogger(__name__)

BLOCKS_PATH = "/v1/blocks/"
STORES_PATH = "/v1/stores/"
FILES_PART = "/files/"
SEND_BYTES = 1 << 20
"""Bytes that are handed to the kernel at once, at most."""
MAX_TURN_S = 2.0
"""Time in which each connection has its turn under a rate limit: less than clients wait."""
REQUEST_TIMEOUT_S = 20.0
"""For a client to send a request, or to read what was sent."""
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")


class BlockServer(ThreadingHTTPServer):
    """Serves one store. `serve_forever` runs until `shutdown`.

    Args:
        address: host and port to listen on; port 0 lets the system choose.
        index: the store's blocks.
        token: bearer token of clients; empty requires none.
        max_connections: maximum number of open connections.
        bytes_per_s: maximum rate of all connections together; None for no limit.
        tls: the server's certificate; None serves without TLS.
        peers: names of which certificates of clients over TLS must have one, for `/v1`.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        index: BlockIndex,
        *,
        token: str,
        max_connections: int,
        bytes_per_s: float | None = None,
        tls: TlsFolder | None = None,
        peers: Set[str] = frozenset(),
    ) -> None:
        self._tls = tls
        self._peers = peers
        self.index = index
        self.limiter: ByteRateLimiter | None = None
        self.send_bytes = SEND_BYTES
        if bytes_per_s is not None:
            self.limiter = ByteRateLimiter(bytes_per_s)
            turn_bytes = int(bytes_per_s * MAX_TURN_S / max_connections)
            self.send_bytes = min(SEND_BYTES, max(1, turn_bytes))
        self._expected = f"Bearer {token}".encode() if token else b""
        self._slots = threading.BoundedSemaphore(max_connections)
        super().__init__(address, _BlockRequest)

    def is_authorized(self, authorization: str) -> bool:
        """Return whether an Authorization header has the token, if there is one."""
        got = authorization.encode("utf-8", "surrogateescape")
        return not self._expected or hmac.compare_digest(got, self._expected)

    def is_peer(self, connection: socket.socket) -> bool:
        """Return whether a client has shown a peer's certificate, if there is TLS."""
        return not isinstance(connection, ssl.SSLSocket) or is_named(connection, self._peers)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, or refuse it."""
        if not self._slots.acquire(blocking=False):
            if self._tls is None:
                _refuse(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread that would release it
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it is closed."""
        try:
            if self._tls is not None:
                request = self._shake_hands(request, self._tls)
            if request is not None:
                super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def _shake_hands(self, request: Any, tls: TlsFolder) -> ssl.SSLSocket | None:
        """Return the connection with TLS; None if the client has ended or refuses it."""
        request.settimeout(REQUEST_TIMEOUT_S)
        try:
            return tls.server_context().wrap_socket(request, server_side=True)
        except OSError as error:  # a kubelet that only connects, or no TLS
            logger.info("no TLS connection: %s", error)
            self.shutdown_request(request)
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection ended by an error, as when its client has left."""
        logger.info("connection of %s ended", client_address, exc_info=True)


def _refuse(connection: socket.socket) -> None:
    body = _error_body("overloaded", "connections: all are in use", field=None)
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    try:
        connection.sendall(head.encode() + body)
    except OSError as error:
        logger.info("a connection that was refused is gone: %s", error)


def _error_body(code: str, message: str, *, field: str | None) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "field": field}}).encode()


class _BlockRequest(BaseHTTPRequestHandler):
    """One connection."""

    server: BlockServer
    protocol_version = "HTTP/1.1"
    server_version = "faasmoe"
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a request."""
        path = unquote(self.path)
        if path == "/healthz":
            self._send_json(HTTPStatus.OK, b'{"status": "ok"}')
        elif not self.server.is_peer(self.connection):
            message = "certificate: got none of a peer, expected one of a sandbox"
            self._send_error(HTTPStatus.FORBIDDEN, "no_certificate", message, "certificate")
        elif not self.server.is_authorized(self.headers.get("Authorization", "")):
            message = "authorization: expected the bearer token"
            self._send_error(HTTPStatus.UNAUTHORIZED, "unauthorized", message, "authorization")
        elif path.startswith(BLOCKS_PATH):
            self._send_block(path.removeprefix(BLOCKS_PATH))
        else:
            self._send_file(path)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request."""
        logger.debug(format, *args)

    def _send_block(self, digest: str) -> None:
        ranges = self.server.index.block(digest)
        if ranges is None:
            self._not_found("block", digest)
        else:
            self._send_ranges(HTTPStatus.OK, ranges)

    def _send_file(self, path: str) -> None:
        """Send a file of the store, or the part of it that the header Range names."""
        index = self.server.index
        prefix = f"{STORES_PATH}{index.store.manifest.digest}{FILES_PART}"
        name = path.removeprefix(prefix) if path.startswith(prefix) else ""
        file = index.file(name) if name else None
        if file is None:
            self._not_found("path", path)
            return
        text = self.headers.get("Range")
        part = file if text is None else _part_of(file, text)
        if part is None:
            message = f"range: got {short_repr(text)}, expected bytes=FIRST-LAST within the file"
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            self._send_error(status, "bad_range", message, "range")
            return
        self._send_ranges(HTTPStatus.OK if text is None else HTTPStatus.PARTIAL_CONTENT, [part])

    def _send_ranges(self, status: HTTPStatus, ranges: Sequence[FileRange]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(sum(part.size_bytes for part in ranges)))
        self.end_headers()
        for part in ranges:
            if not self._send_range(part):
                self.close_connection = True  # so that the client sees that bytes are missing
                return

    def _send_range(self, part: FileRange) -> bool:
        """Send bytes of a file; return whether it has them."""
        with part.path.open("rb") as file:
            sent, limiter = 0, self.server.limiter
            while sent < part.size_bytes:
                count = min(self.server.send_bytes, part.size_bytes - sent)
                if limiter is not None:
                    time.sleep(limiter.reserve(count, time.monotonic()))
                n_sent = _send_part(self.connection, file, part.offset + sent, count)
                if n_sent == 0:
                    logger.error("%s: shorter than the manifest says", part.path)
                    return False
                sent += n_sent
        return True

    def _not_found(self, field: str, got: str) -> None:
        index = self.server.index
        message = f"{field}: got {short_repr(got)}, expected one of {index.store.manifest.digest}"
        self._send_error(HTTPStatus.NOT_FOUND, "not_found", message, field)

    def _send_error(self, status: HTTPStatus, code: str, message: str, field: str) -> None:
        self._send_json(status, _error_body(code, message, field=field))

    def _send_json(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _send_part(connection: socket.socket, file: BinaryIO, offset: int, count: int) -> int:
    """Send bytes of a file; return how many there were."""
    if not isinstance(connection, ssl.SSLSocket):
        return connection.sendfile(file, offset, count)
    data = os.pread(file.fileno(), count, offset)  # `sendfile` would encrypt 8 KiB at a time
    connection.sendall(data)
    return len(data)


def _part_of(file: FileRange, text: str) -> FileRange | None:
    """Return the part that a Range header names; None if the file does not have it."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = int(match[1]), min(int(match[2]), file.size_bytes - 1)
    return FileRange(file.path, first, last - first + 1) if first <= last else None
