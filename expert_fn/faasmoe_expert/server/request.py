"""A request, as far as it has been read, and what answers one."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from faasmoe_expert.server.answer import Answer
from faasmoe_expert.wire.checksum import Buffer


@dataclass(slots=True)
class HttpRequest:
    """One request, as far as it has been read; `begun_s` is on the monotonic clock."""

    target: bytes = b""
    authorization: bytes = b""
    method: str = ""
    begun_s: float | None = None
    sender: Hashable = None  # who is at the other end, as far as that can be told
    head_bytes: int = 0
    later_bytes: int = 0  # received after the packet in which it began
    body: bytearray = field(default_factory=bytearray)
    shared: memoryview | None = None  # a frame that lies in shared memory, in place of the body
    shared_place: bytes | None = None
    shared_offer: bytes | None = None
    announced_bytes: int = 0
    taken_bytes: int | None = None  # by the intake; None while the body has not begun

    @property
    def frame(self) -> Buffer:
        """The body, or what lies in shared memory in its place."""
        return self.body if self.shared is None else self.shared


Handle = Callable[[HttpRequest], Answer | Future[Answer]]
"""Computes the answer of a whole request, or one to come; neither raises."""
