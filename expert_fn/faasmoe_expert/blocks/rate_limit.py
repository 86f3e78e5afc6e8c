"""A limit of bytes per second that several threads share. Time is an argument."""

from __future__ import annotations

import math
import threading

BURST_S = 0.05
"""What may be sent at once after a pause, in seconds of the rate."""


class ByteRateLimiter:
    """Says how long to wait before bytes are sent.

    Args:
        bytes_per_s: the rate, more than 0.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = -math.inf  # when all bytes that were reserved are sent at the rate

    def reserve(self, size_bytes: int, now_s: float) -> float:
        """Reserve bytes; return after how many seconds they may be sent."""
        with self._lock:
            start_s = max(self._free_at_s, now_s - BURST_S)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
        return max(0.0, start_s - now_s)
