"""The memory that a sandbox's functions take, and how much they may: refused before it runs out.

What is counted are the bytes of attached functions' parameters. On a device that other processes
use too, what is free decides as well, at the moment of each attach.
"""

from __future__ import annotations

from typing import Protocol

import torch

from faasmoe_expert.errors import OutOfMemory

RESERVE_BYTES = 512 << 20
"""Left free on a device for activations, and for the contexts of other processes."""


class DeviceMemory(Protocol):
    """A device whose memory is shared out."""

    def free_bytes(self) -> int:
        """Return what could be allocated now."""

    def release_cached(self) -> None:
        """Let other processes have what is held and not used."""


class CudaDeviceMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """Return what the driver has, and what torch keeps unused."""
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        cached_bytes = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return free_bytes + cached_bytes

    def release_cached(self) -> None:
        """Return what torch keeps unused to the driver."""
        torch.cuda.empty_cache()


class MemoryBudget:
    """What functions take, and may take.

    Args:
        limit_bytes: for all functions together; None for no limit but the device's.
        device: where they are; None for the host, whose pages are shared and can be taken back.
        reserve_bytes: what is left free on the device.
    """

    def __init__(
        self,
        limit_bytes: int | None,
        device: DeviceMemory | None,
        *,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._device = device
        self._reserve_bytes = reserve_bytes
        self.used_bytes = 0

    def limit_bytes(self) -> int | None:
        """Return what functions may take now, those that are attached included; None for all."""
        if self._device is None:
            return self._limit_bytes
        free_bytes = self._device.free_bytes() - self._reserve_bytes
        available_bytes = self.used_bytes + max(0, free_bytes)
        return (
            available_bytes
            if self._limit_bytes is None
            else min(self._limit_bytes, available_bytes)
        )

    def check_fits(self, size_bytes: int) -> None:
        """Raise OutOfMemory if a function of this size may not be attached now."""
        limit_bytes = self.limit_bytes()
        if limit_bytes is not None and self.used_bytes + size_bytes > limit_bytes:
            left_bytes = max(0, limit_bytes - self.used_bytes)
            raise OutOfMemory(
                f"memory: got a function of {size_bytes} bytes, expected at most {left_bytes}, "
                f"what is left of {limit_bytes} beside the functions that are attached",
                field="memory",
            )

    def add(self, size_bytes: int) -> None:
        """Count a function that was attached."""
        self.used_bytes += size_bytes

    def release(self, size_bytes: int = 0) -> None:
        """Count a function off that is gone, and let other processes have its memory."""
        self.used_bytes -= size_bytes
        if self._device is not None:
            self._device.release_cached()


def memory_budget_for(device: torch.device, limit_bytes: int | None) -> MemoryBudget:
    """Return the memory of functions on `device`."""
    return MemoryBudget(limit_bytes, None if device.type == "cpu" else CudaDeviceMemory(device))
