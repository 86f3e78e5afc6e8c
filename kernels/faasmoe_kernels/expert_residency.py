"""The policy of what stays in memory that cannot hold all experts; see expert_residency.h.

The library applies it to the experts that it computes. Here it can be played by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_kernels.library import KernelLibrary

MAX_EVICTED = 1 << 16
_UNLIMITED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """An expert that a call computes.

    Attributes:
        expert: a number that names it, among those of all layers.
        layer: a number that names its layer.
        size_bytes: bytes of its weights.
    """

    expert: int
    layer: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """What to do with the experts of a call.

    Attributes:
        read: experts of the call that may not be in memory, to be read before they are computed.
        dropped: experts of the call that leave memory once they are computed.
        evicted: other experts, which leave memory now.
    """

    read: tuple[int, ...]
    dropped: tuple[int, ...]
    evicted: tuple[int, ...]


class ExpertResidency:
    """Decides which experts stay in memory; times are in seconds of any clock.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        self._free = library.function("fk_residency_free", (pointer,), None)
        self._begin = library.function(
            "fk_residency_begin",
            (pointer, ctypes.c_double, pointer, i64, pointer, pointer, pointer, i64),
            i64,
        )
        self._finish = library.function(
            "fk_residency_finish", (pointer, ctypes.c_double, i64, pointer, i64), i64
        )
        self._capacity = library.function("fk_residency_capacity", (pointer,), i64)
        self._kept = library.function("fk_residency_kept", (pointer,), i64)
        self._residency = library.function("fk_residency_new", (), pointer)()
        self._evicted = (i64 * MAX_EVICTED)()

    def __del__(self) -> None:
        """Free the native object."""
        if hasattr(self, "_residency"):
            self._free(self._residency)

    @property
    def capacity_bytes(self) -> int | None:
        """The bytes of experts that may stay; None if all may."""
        capacity: int = self._capacity(self._residency)
        return None if capacity == _UNLIMITED else capacity

    @property
    def kept_bytes(self) -> int:
        """The bytes of experts that stay."""
        kept: int = self._kept(self._residency)
        return kept

    def begin(self, now_s: float, uses: Sequence[ExpertUse]) -> ResidencyPlan:
        """Begin a call that computes these experts, each named once."""
        n = len(uses)
        numbers = (ctypes.c_int64 * (3 * n))(
            *(x for use in uses for x in (use.expert, use.layer, use.size_bytes))
        )
        is_read, is_dropped = (ctypes.c_uint8 * n)(), (ctypes.c_uint8 * n)()
        n_evicted = self._begin(
            *(self._residency, now_s, numbers, n, is_read, is_dropped, self._evicted, MAX_EVICTED)
        )
        return ResidencyPlan(
            tuple(use.expert for use, flag in zip(uses, is_read, strict=True) if flag),
            tuple(use.expert for use, flag in zip(uses, is_dropped, strict=True) if flag),
            tuple(self._evicted[:n_evicted]),
        )

    def finish(self, now_s: float, missed_bytes: int) -> tuple[int, ...]:
        """End the call; return the experts that leave memory now.

        Args:
            now_s: the time.
            missed_bytes: bytes that were not in memory of experts that the plan did not read.
        """
        n = self._finish(self._residency, now_s, missed_bytes, self._evicted, MAX_EVICTED)
        return tuple(self._evicted[:n])
