"""Memory over time: what the active functions held, beside what all would have held. Pure."""

from __future__ import annotations

BYTES_PER_GB = 1e9


class MemoryTime:
    """Integrates the bytes of active functions over time.

    Args:
        all_bytes: bytes of all functions of the model.
        now: current time, seconds.

    Attributes:
        active_bytes: bytes of the functions with at least one replica; each replica counts.
    """

    def __init__(self, all_bytes: int, *, now: float) -> None:
        self._all_bytes = all_bytes
        self._started_at = self._updated_at = now
        self._active_byte_seconds = 0.0
        self.active_bytes = 0

    def update(self, active_bytes: int, *, now: float) -> None:
        """Record that the active functions hold this much from now on."""
        self._active_byte_seconds += self.active_bytes * max(0.0, now - self._updated_at)
        self._updated_at = max(now, self._updated_at)
        self.active_bytes = active_bytes

    def active_gb_seconds(self, now: float) -> float:
        """Return the GB-seconds that active functions have held since the start."""
        held = self._active_byte_seconds
        return (held + self.active_bytes * max(0.0, now - self._updated_at)) / BYTES_PER_GB

    def resident_gb_seconds(self, now: float) -> float:
        """Return the GB-seconds of all functions, had they been active since the start."""
        return self._all_bytes * max(0.0, now - self._started_at) / BYTES_PER_GB
