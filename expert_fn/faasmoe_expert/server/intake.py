"""How much a sandbox takes in at once: what is more is refused, and sent elsewhere.

Requests are computed one after the other, so what can pile up are bodies that are not whole yet.
"""

from __future__ import annotations

from faasmoe_expert.errors import Overloaded


class Intake:
    """Counts the requests that are being read, and their bodies' bytes.

    Args:
        max_frames: requests with a body that are read at the same time.
        max_bytes: their bytes, together; announced ones count before they come.
    """

    def __init__(self, *, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._n_frames = 0
        self._n_bytes = 0

    def begin(self, n_bytes: int) -> None:
        """Take in a request whose body has, or begins with, so many bytes; raises Overloaded."""
        if self._n_frames >= self._max_frames:
            raise Overloaded(
                f"frames: got one more than the {self._max_frames} that are read at once",
                field="frames",
            )
        self._check_bytes(n_bytes)
        self._n_frames += 1
        self._n_bytes += n_bytes

    def grow(self, n_bytes: int) -> None:
        """Take in more of a body than was announced; raises Overloaded."""
        self._check_bytes(n_bytes)
        self._n_bytes += n_bytes

    def end(self, n_bytes: int) -> None:
        """Count a request as answered or lost, with all the bytes that were taken in of it."""
        self._n_frames -= 1
        self._n_bytes -= n_bytes

    def _check_bytes(self, n_bytes: int) -> None:
        if self._n_bytes + n_bytes > self._max_bytes:
            raise Overloaded(
                f"body: got {self._n_bytes + n_bytes} bytes in all requests that are read, "
                f"expected at most {self._max_bytes}",
                field="body",
            )
