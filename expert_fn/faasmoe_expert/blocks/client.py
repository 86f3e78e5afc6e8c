"""Client of block servers: requests that are tried at one peer after another.

Used by several threads. Knows nothing of where the bytes go.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import TypeVar
from urllib.parse import quote, urlsplit

from faasmoe_contracts.tls import TlsPeer
from faasmoe_expert.blocks.server import BLOCKS_PATH, FILES_PART, STORES_PATH

TIMEOUT_S = 5.0
"""For a connection, and for each read."""
RETRY_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 4.0)
"""All attempts end before the control plane stops waiting for an attach."""
MAX_ERROR_BYTES = 4096
MAX_FILE_BYTES = 256 << 20
"""Of a file that is read into memory: a manifest, a header, or a file of the model's config."""

Result = TypeVar("Result")
Consume = Callable[[HTTPResponse], Result]
"""Reads a response to its end; raises PeerError if it is not as expected."""


class PeerError(Exception):
    """A peer, or every one of them, did not serve what was asked for."""


class PeerClient:
    """Requests to block servers of the same store.

    Args:
        urls: their URLs, `http://HOST:PORT` or with TLS `https://HOST:PORT`; the first request goes
            to the first one, the next to the next.
        token: bearer token; empty for none.
        tls: certificate to show, and the name that peers must have; None for peers without TLS.
        retry_delays_s: delays before the attempts of a request.
        sleep: waits; replaced in tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str,
        tls: TlsPeer | None = None,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._urls = tuple(urls)
        self._tls = tls
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._retry_delays_s = tuple(retry_delays_s)
        self._sleep = sleep
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._idle: dict[str, list[HTTPConnection]] = {url: [] for url in self._urls}

    def read_block(self, digest: str, consume: Consume[Result]) -> Result:
        """Hand the response with a block to `consume`; raises PeerError."""
        return self._get(f"{BLOCKS_PATH}{digest}", consume, {})

    def read_file(self, model_digest: str, name: str, parse: Callable[[bytes], Result]) -> Result:
        """Return what `parse` makes of a file of a store; raises PeerError.

        Args:
            model_digest: digest of the store's manifest.
            name: the file.
            parse: raises PeerError if the content is not as expected.
        """
        path = f"{STORES_PATH}{model_digest}{FILES_PART}{quote(name)}"
        return self._get(path, lambda response: parse(_read_whole(response)), {})

    def read_file_start(self, model_digest: str, name: str, size_bytes: int) -> bytes:
        """Return the first bytes of a file of a store, or all if it is shorter; raises PeerError.

        Args:
            model_digest: digest of the store's manifest.
            name: the file.
            size_bytes: number of bytes, 1 or more.
        """
        path = f"{STORES_PATH}{model_digest}{FILES_PART}{quote(name)}"
        return self._get(path, _read_whole, {"Range": f"bytes=0-{size_bytes - 1}"})

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        with self._lock:
            connections = [c for idle in self._idle.values() for c in idle]
            self._idle = {url: [] for url in self._urls}
        for connection in connections:
            connection.close()

    def _get(self, path: str, consume: Consume[Result], headers: Mapping[str, str]) -> Result:
        turn, failures = next(self._turns), dict[str, str]()
        for attempt, delay_s in enumerate(self._retry_delays_s):
            self._sleep(delay_s)
            url = self._urls[(turn + attempt) % len(self._urls)]
            try:
                return self._get_from(url, path, consume, headers)
            except (PeerError, HTTPException, OSError) as error:
                failures[url] = str(error) or type(error).__name__
        causes = "; ".join(f"{url}: {failure}" for url, failure in failures.items())
        raise PeerError(f"{path}: no peer served it ({causes})")

    def _get_from(
        self, url: str, path: str, consume: Consume[Result], headers: Mapping[str, str]
    ) -> Result:
        connection = self._take_connection(url)
        try:
            connection.request("GET", path, headers={**self._headers, **headers})
            response = connection.getresponse()
            if response.status not in (200, 206):
                text = response.read(MAX_ERROR_BYTES).decode("utf-8", "replace")
                raise PeerError(f"status {response.status}: {text}")
            result = consume(response)
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle[url].append(connection)
        return result

    def _take_connection(self, url: str) -> HTTPConnection:
        with self._lock:
            if self._idle[url]:
                return self._idle[url].pop()
        parts = urlsplit(url)
        assert parts.hostname is not None  # checked by SandboxConfig
        connection = HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        if self._tls is not None:
            connection.sock = _open_tls(self._tls, (parts.hostname, connection.port))
        return connection


def _open_tls(peer: TlsPeer, address: tuple[str, int]) -> socket.socket:
    """Connect to a peer by its certificate's name; raises OSError."""
    plain = socket.create_connection(address, timeout=TIMEOUT_S)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer.context().wrap_socket(plain, server_hostname=peer.name)
    except BaseException:
        plain.close()
        raise


def _read_whole(response: HTTPResponse) -> bytes:
    if response.length is None or response.length > MAX_FILE_BYTES:
        raise PeerError(f"got {response.length} bytes, expected at most {MAX_FILE_BYTES}")
    return response.read()
