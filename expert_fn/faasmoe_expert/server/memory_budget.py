"""Memory budget of a sandbox's functions, checked before a function is loaded.

Counts the bytes of attached functions' parameters against the configured limit. On a CUDA device,
which other processes use too, the free memory at the time of each attachment limits them as well.
"""

from __future__ import annotations

from typing import Protocol

import torch

from faasmoe_expert.errors import OutOfMemory

RESERVE_BYTES = 512 << 20
"""Memory left free on a device for activations and for contexts of other processes."""


class DeviceMemory(Protocol):
    """Memory of a device that several processes share."""

    def free_bytes(self) -> int:
        """Return the number of bytes that can be allocated now."""

    def release_cached(self) -> None:
        """Release memory that is cached but unused."""


class CudaDeviceMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """Return the driver's free memory plus torch's unused cache, in bytes."""
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        cached_bytes = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return free_bytes + cached_bytes

    def release_cached(self) -> None:
        """Return torch's unused cache to the driver."""
        torch.cuda.empty_cache()


class SandboxMemoryBudget:
    """Counts the memory of attached functions against a limit.

    Args:
        limit_bytes: limit for all functions together; None for no limit but the device's.
        device: memory of their device; None for the host, where mapped pages can be reclaimed.
        reserve_bytes: memory left free on the device.

    Attributes:
        used_bytes: bytes of all attached functions.
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
        """Return the current limit, including the attached functions; None if there is no limit."""
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
        """Raise OutOfMemory if a function of `size_bytes` exceeds the current limit."""
        limit_bytes = self.limit_bytes()
        if limit_bytes is not None and self.used_bytes + size_bytes > limit_bytes:
            remaining_bytes = max(0, limit_bytes - self.used_bytes)
            raise OutOfMemory(
                f"memory: got a function of {size_bytes} bytes, "
                f"expected at most {remaining_bytes}, "
                f"what attached functions leave of {limit_bytes}",
                field="memory",
            )

    def add(self, size_bytes: int) -> None:
        """Count an attached function."""
        self.used_bytes += size_bytes

    def release(self, size_bytes: int = 0) -> None:
        """Stop counting a detached function, and release cached device memory."""
        self.used_bytes -= size_bytes
        if self._device is not None:
            self._device.release_cached()


def memory_budget_for(device: torch.device, limit_bytes: int | None) -> SandboxMemoryBudget:
    """Return the budget for functions on `device`."""
    return SandboxMemoryBudget(
        limit_bytes, None if device.type == "cpu" else CudaDeviceMemory(device)
    )
