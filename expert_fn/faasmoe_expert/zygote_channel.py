"""The zygote's unix socket: JSON lines with one client at a time, the last one that came.

A client may go and another one come at any moment; what is said while there is none is lost, and a
new client asks for what it missed.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 16
SEND_TIMEOUT_S = 2.0
BACKLOG = 4


class Channel:
    """Listens on a unix socket and hands over the lines of its client.

    Args:
        path: the socket; one that an earlier process left there is replaced.
        selector: wakes us; calls the registered data when a socket is readable.
        greeting: what each client is told first.
        obey: takes each line.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        *,
        greeting: dict[str, Any],
        obey: Callable[[bytes], None],
    ) -> None:
        self._selector = selector
        self._greeting = greeting
        self._obey = obey
        self._client: socket.socket | None = None
        self._buffer = b""
        unfinished = path.with_name(f"{path.name}~")  # what is at `path` can be connected to
        unfinished.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(unfinished))
        unfinished.chmod(0o600)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        unfinished.replace(path)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def emit(self, event: dict[str, Any]) -> None:
        """Tell the client, if there is one; one that does not listen is dropped."""
        if self._client is None:
            return
        try:
            self._client.sendall(json.dumps(event).encode() + b"\n")
        except OSError as error:
            log.warning("the client of the zygote is dropped: %s", error)
            self._drop()

    def close(self) -> None:
        """Stop listening; the client's connection ends."""
        self._selector.unregister(self._listener)
        self._listener.close()
        self._drop()

    def let_go(self) -> None:
        """Close, in a forked child, the descriptors that belong to the zygote."""
        for held in (self._listener, self._client):
            if held is not None:
                os.close(held.detach())
        self._client = None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it went away before we came to it
            return
        self._drop()
        client.settimeout(SEND_TIMEOUT_S)
        self._client, self._buffer = client, b""
        self._selector.register(client, selectors.EVENT_READ, partial(self._read, client))
        self.emit(self._greeting)

    def _read(self, client: socket.socket) -> None:
        if client is not self._client:  # replaced within this turn of the selector
            return
        try:
            chunk = client.recv(MAX_LINE_BYTES)
        except OSError:
            chunk = b""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if not chunk or len(self._buffer) > MAX_LINE_BYTES:
            self._drop()
        for line in lines:
            self._obey(line)

    def _drop(self) -> None:
        if self._client is not None:
            self._selector.unregister(self._client)
            self._client.close()
        self._client, self._buffer = None, b""
