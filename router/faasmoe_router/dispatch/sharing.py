"""Large frames of one connection in memory that is shared with the sandbox; small ones are sent.

The memory is offered beside the first large frame, which is sent, and used once the sandbox has
said that it has mapped it. A sandbox that says nothing gets all frames over its socket: of another
version, user or PID namespace. See docs/wire.md, "Frames in shared memory".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from faasmoe_expert.shared_region import (
    FRAME_HEADER,
    MAX_REGION_BYTES,
    REGION_HEADER,
    SharedRegion,
)
from faasmoe_expert.wire.checksum import Buffer
from faasmoe_router.dispatch.errors import CallError

SHARED_FRAME_BYTES = 32 << 10
"""Frames of so many bytes and more are shared: docs/performance.md, "Frames in shared memory"."""

LEAST_REGION_BYTES = 1 << 20


class SharedOutbox:
    """One connection's shared memory.

    Args:
        least_bytes: of a frame that is shared.
    """

    def __init__(self, least_bytes: int = SHARED_FRAME_BYTES) -> None:
        self._least_bytes = least_bytes
        self._region: SharedRegion | None = None
        self._is_offered = False
        self._is_refused = False

    def put(self, parts: Sequence[memoryview]) -> tuple[str, Sequence[memoryview]]:
        """Put a frame in the memory, offer memory, or do neither.

        Args:
            parts: the frame's bytes.

        Returns:
            The header lines that say where the frame is, and what is to be sent after them.
        """
        size_bytes = sum(len(part) for part in parts)
        sent = f"content-length: {size_bytes}\r\n"
        self._is_offered = False
        if size_bytes < self._least_bytes or self._is_refused:
            return sent, parts
        if self._region is not None and 2 * size_bytes <= len(self._region.view):
            _fill(self._region.view, parts)
            return f"content-length: 0\r\n{FRAME_HEADER}: {size_bytes}\r\n", ()
        return sent + self._offer(size_bytes), parts

    def hear(self, headers: Mapping[bytes, bytes]) -> None:
        """Take note of what the sandbox says of an offer, by its answer's headers."""
        if not self._is_offered:
            return
        assert self._region is not None
        self._is_offered = False
        self._region.forget_descriptor()
        size = headers.get(REGION_HEADER.encode(), b"")
        if size != str(len(self._region.view)).encode():
            self._region, self._is_refused = None, True

    def answer(self, place: bytes) -> memoryview:
        """Return the answer that lies at `place`, valid until the next call; raises CallError.

        Args:
            place: where it begins and its size, in bytes, in decimal.
        """
        begin, _, length = place.partition(b" ")
        is_there = self._region is not None and begin.isdigit() and length.isdigit()
        if not is_there or int(begin) + int(length) > len(self._region.view):  # type: ignore[union-attr]
            raise CallError(f"{FRAME_HEADER}: got {place[:40]!r}, expected a place that is shared")
        assert self._region is not None
        return self._region.view[int(begin) : int(begin) + int(length)]

    def rest(self) -> None:
        """Give the memory's pages back until they are used; no call may be in flight."""
        if self._region is not None:
            self._region.give_back()

    def close(self) -> None:
        """Give the memory back."""
        if self._region is not None:
            self._region.forget_descriptor()
            self._region = None

    def _offer(self, size_bytes: int) -> str:
        """Return the header line that offers memory for such frames and their answers."""
        wanted = max(LEAST_REGION_BYTES, 1 << (2 * size_bytes - 1).bit_length())
        self.close()
        if wanted > MAX_REGION_BYTES:
            return ""
        try:
            self._region = SharedRegion.create(wanted)
        except OSError:  # no memory, no descriptors: frames are sent
            self._is_refused = True
            return ""
        self._is_offered = True
        return f"{REGION_HEADER}: {self._region.descriptor} {wanted}\r\n"


def _fill(view: memoryview, parts: Sequence[Buffer]) -> None:
    at = 0
    for part in parts:
        size_bytes = len(part)
        view[at : at + size_bytes] = part
        at += size_bytes
