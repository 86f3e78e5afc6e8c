"""A request that can be sent again: its head, its body and the journal of its stream.

What is held is bounded: by request, and over all requests by a `HoldBudget`. A request beyond the
bounds is answered like any other, but ends with its router.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope

from faasmoe_contracts.stream_records import (
    FRONT_HEADER,
    JOURNAL_HEADER,
    ORIGIN_HEADER,
    TENANT_HEADER,
    format_journal_header,
    format_origin_header,
)
from faasmoe_tracing import TRACEPARENT

MAX_HELD_BODY_BYTES = 16 << 20
MAX_HELD_JOURNAL_BYTES = 16 << 20
MAX_HELD_BYTES = 256 << 20
MAX_READ_AHEAD_BYTES = 64 << 10
_DROPPED_HEADERS = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"content-length"),
        *(FRONT_HEADER.encode(), JOURNAL_HEADER.encode(), TENANT_HEADER.encode()),
        ORIGIN_HEADER.encode(),
    )
)


class ClientGone(Exception):
    """The client has hung up."""


class HoldBudget:
    """Bytes that all held requests may take together.

    Args:
        max_bytes: how many.
    """

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self.n_bytes = 0

    def take(self, n_bytes: int) -> bool:
        """Take bytes; return whether there are as many."""
        if self.n_bytes + n_bytes > self._max_bytes:
            return False
        self.n_bytes += n_bytes
        return True


class HeldRequest:
    """One request of a client, from its first attempt to the end of its response.

    Args:
        scope: its ASGI scope.
        receive: receives its body.
        budget: bounds what all requests hold.

    Attributes:
        n_frames: events that the client has got.
    """

    def __init__(self, scope: Scope, receive: Receive, budget: HoldBudget) -> None:
        self._receive = receive
        self._budget = budget
        self._method: str = scope["method"]
        self._target: bytes = scope["raw_path"]
        if scope["query_string"]:
            self._target += b"?" + scope["query_string"]
        self._headers = [h for h in scope["headers"] if h[0] not in _DROPPED_HEADERS]
        self._length = next((v for n, v in scope["headers"] if n == b"content-length"), None)
        self._is_chunked = any(n == b"transfer-encoding" for n, _ in scope["headers"])
        self._origin = format_origin_header(secrets.token_hex(16), int(time.time()))
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._journal: list[bytes] = []
        self._journal_bytes = 0
        self._taken_bytes = 0
        self._n_ahead = 0  # bytes taken before they are received
        self._is_complete = asyncio.Event()
        if not self._is_chunked and self._length in (None, b"0"):
            self._is_complete.set()
        self._is_held = True
        self.n_frames = 0

    @property
    def is_head(self) -> bool:
        """Whether its response has no body."""
        return self._method == "HEAD"

    @property
    def is_work(self) -> bool:
        """Whether it is worth waiting for a router that is away."""
        return self._method == "POST"

    @property
    def has_key(self) -> bool:
        """Whether its client shows a key, valid or not."""
        return any(name in (b"authorization", b"x-api-key") for name, _ in self._headers)

    @property
    def can_repeat(self) -> bool:
        """Whether it can be sent again."""
        return self._is_held

    def hand_on(self, traceparent: str) -> None:
        """Set the span that the router's is a child of; empty leaves what the client has sent."""
        if traceparent:
            name = TRACEPARENT.encode()
            self._headers = [h for h in self._headers if h[0] != name]
            self._headers.append((name, traceparent.encode()))

    def address(self, path: str, *, tenant: str) -> None:
        """Set what a router gets instead of the client's path and key.

        Args:
            path: the path, without a tenant's name.
            tenant: whose request it is; empty if everyone may use the model.
        """
        query = self._target.partition(b"?")[1:]
        self._target = path.encode() + b"".join(query)
        secret = (b"authorization", b"x-api-key")
        self._headers = [h for h in self._headers if h[0] not in secret]
        if tenant:
            self._headers.append((TENANT_HEADER.encode(), tenant.encode()))

    async def read_ahead(self) -> bool:
        """Receive the whole body if it is small; return whether it is here.

        Raises:
            ClientGone: the client hung up before its end.
        """
        length = int(self._length or 0)
        if self._is_complete.is_set():
            return True
        is_small = length <= min(MAX_READ_AHEAD_BYTES, MAX_HELD_BODY_BYTES)
        if self._is_chunked or not is_small or not self._take(length):
            return False
        self._n_ahead = length
        async for _ in self.body():
            pass
        return True

    async def read_body(self, max_bytes: int) -> bytes | None:
        """Return the whole body; None if it has more bytes, or cannot be held.

        Raises:
            ClientGone: the client hung up before its end.
        """
        async for _ in self.body():
            if self._body_bytes > max_bytes or not self._is_held:
                return None
        return b"".join(self._body)

    def record(self, journal: bytes, *, is_event: bool) -> None:
        """Keep a piece of the journal, and count a frame that the client is about to get."""
        self.n_frames += is_event
        if not journal or not self._is_held:
            return
        self._journal_bytes += len(journal)
        if self._journal_bytes > MAX_HELD_JOURNAL_BYTES or not self._take(len(journal)):
            self._drop()
            return
        self._journal.append(journal)

    def release(self) -> None:
        """Give back what it holds."""
        self._drop()

    def head(self, front_token: str, *, stays_open: bool) -> bytes:
        """Return the head to send to a router, which goes on after what the client has.

        Args:
            front_token: what to show it.
            stays_open: whether it is to keep the connection after the response.
        """
        lines = [f"{self._method} ".encode() + self._target + b" HTTP/1.1\r\n"]
        lines += [name + b": " + value + b"\r\n" for name, value in self._headers]
        lines.append(f"{FRONT_HEADER}: {front_token}\r\n".encode())
        lines.append(f"{ORIGIN_HEADER}: {self._origin}\r\n".encode())
        if self._journal:
            value = format_journal_header(self._journal_bytes, self.n_frames)
            lines.append(f"{JOURNAL_HEADER}: {value}\r\n".encode())
        if self.sends_chunks:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif self._length is not None:
            length = int(self._length) + self._journal_bytes
            lines.append(f"content-length: {length}\r\n".encode())
        if not stays_open:
            lines.append(b"connection: close\r\n")
        return b"".join((*lines, b"\r\n"))

    @property
    def sends_chunks(self) -> bool:
        """Whether its body is sent in chunks, as its length is unknown."""
        return self._is_chunked

    @property
    def is_small(self) -> bool:
        """Whether journal and body are here, small and not sent in chunks."""
        is_here = self._is_held and self._is_complete.is_set() and not self.sends_chunks
        return is_here and self._journal_bytes + self._body_bytes <= MAX_READ_AHEAD_BYTES

    def small_content(self) -> bytes | None:
        """Return journal and body if the request is small; else None."""
        return b"".join((*self._journal, *self._body)) if self.is_small else None

    async def body(self) -> AsyncIterator[bytes]:
        """Yield journal and body: what is held, then the rest as it arrives.

        Raises:
            ClientGone: the client hung up before its end.
        """
        for part in (*self._journal, *self._body):
            yield part
        while not self._is_complete.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            self._hold_body(part)
            if not message.get("more_body", False):
                self._is_complete.set()
            if part:
                yield part

    async def wait_until_gone(self) -> None:
        """Return when the client has hung up after its body."""
        await self._is_complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _hold_body(self, part: bytes) -> None:
        self._body_bytes += len(part)
        if not self._is_held:
            return
        n_taken = min(len(part), self._n_ahead)
        self._n_ahead -= n_taken
        if self._body_bytes > MAX_HELD_BODY_BYTES or not self._take(len(part) - n_taken):
            self._drop()
            return
        self._body.append(part)

    def _take(self, n_bytes: int) -> bool:
        is_taken = self._budget.take(n_bytes)
        self._taken_bytes += n_bytes if is_taken else 0
        return is_taken

    def _drop(self) -> None:
        self._is_held = False
        self._body, self._journal = [], []
        self._budget.n_bytes -= self._taken_bytes
        self._taken_bytes = 0
