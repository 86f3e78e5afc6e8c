"""Frames that a client of this machine leaves in shared memory instead of sending them.

A client offers memory beside a frame that it sends; if it can be mapped, the answer says so, and
from then on frames may lie in it: a request at its beginning, the answer behind it. Whatever does
not fit is sent. See docs/wire.md, "Frames in shared memory".
"""

from __future__ import annotations

import logging
from dataclasses import replace

from faasmoe_expert.errors import BadFrame, shown
from faasmoe_expert.server.answer import Answer
from faasmoe_expert.shared_region import (
    FRAME_HEADER,
    MAX_REGION_BYTES,
    REGION_HEADER,
    SharedRegion,
)
from faasmoe_expert.wire import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
MAX_DIGITS = 10


class SharedInbox:
    """What one connection's client shares.

    Args:
        client_pid: the process at the other end; None where none can be seen: nothing is taken.
    """

    def __init__(self, client_pid: int | None) -> None:
        self._client_pid = client_pid
        self._region: SharedRegion | None = None

    def accept(self, offer: bytes, answer: Answer) -> Answer:
        """Map what is offered, beside a frame that was answered; say so in its answer.

        Args:
            offer: descriptor and size in bytes, in decimal.
            answer: an offer is worth nothing if its request was refused.
        """
        if self._client_pid is None or answer.status != 200:
            return answer
        self._region = None
        try:
            descriptor, size_bytes = _integers(offer, 2)
            if not 0 < size_bytes <= MAX_REGION_BYTES:
                raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_REGION_BYTES}")
            self._region = SharedRegion.open(self._client_pid, descriptor, size_bytes)
        except (OSError, ValueError) as error:
            logger.info("%s: not taken, frames are sent: %s", REGION_HEADER, error)
            return answer
        return replace(answer, headers=f"{REGION_HEADER}: {size_bytes}\r\n")

    def frame(self, place: bytes) -> memoryview:
        """Return the frame that lies at the beginning; raises BadFrame.

        Args:
            place: its size in bytes, in decimal.
        """
        size_bytes = 0 if self._region is None else len(self._region.view)
        try:
            (length,) = _integers(place, 1)
        except ValueError as error:
            raise BadFrame(f"{FRAME_HEADER}: {error}", field=FRAME_HEADER) from error
        if self._region is None or length > min(size_bytes, MAX_FRAME_BYTES):
            raise BadFrame(
                f"{FRAME_HEADER}: got {length} bytes, expected at most {size_bytes}, "
                "which are shared on this connection",
                field=FRAME_HEADER,
            )
        return self._region.view[:length]

    def place(self, answer: Answer, behind: int) -> Answer:
        """Put an answer's frame into the memory if it has room there.

        Args:
            answer: the answer.
            behind: bytes of the request's frame.
        """
        begin = -(-behind // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        parts = [memoryview(part).cast("B") for part in answer.body]
        length = sum(len(part) for part in parts)
        if self._region is None or answer.status != 200:
            return answer
        if begin + length > len(self._region.view):
            return answer
        at = begin
        for part in parts:
            self._region.view[at : at + len(part)] = part
            at += len(part)
        return replace(answer, body=(), headers=f"{FRAME_HEADER}: {begin} {length}\r\n")


def _integers(text: bytes, n: int) -> list[int]:
    parts = text.split()
    if len(parts) != n or not all(p.isdigit() and len(p) <= MAX_DIGITS for p in parts):
        raise ValueError(f"got {shown(text.decode('latin-1'))}, expected {n} decimal numbers")
    return [int(part) for part in parts]
