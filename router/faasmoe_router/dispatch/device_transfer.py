"""Between a GPU and the calls: a layer's rows and routing to the host, the parts of its sum back.

Functions are called with host memory. Each layer the rows and their routing are copied into pinned
buffers, all begun at once and waited for once; what functions return is copied back part by part
without waiting, and added there (sums.py). A buffer is overwritten only after the wait of the next
layer, which comes after everything that the last layer began. Buffers grow and are kept: pinning
takes longer than copying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_BUFFER_BYTES = 1 << 16


class HostMemory(Protocol):
    """What a device layer offers: memory that the device copies to and from, and marks."""

    @property
    def device(self) -> torch.device:
        """The device."""

    def empty(self, size_bytes: int) -> Tensor:
        """Return uint8 host memory, [size_bytes]."""

    def record_event(self) -> Callable[[], None]:
        """Mark what was begun so far; the mark, when called, waits for it."""


class PinnedMemory:
    """Page-locked memory beside a CUDA device, and events on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, size_bytes: int) -> Tensor:
        """Return pinned uint8 memory, [size_bytes]."""
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def record_event(self) -> Callable[[], None]:
        """Record an event; calling the mark waits for it."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize


@dataclass(frozen=True, slots=True)
class HostInputs:
    """A layer's inputs on the host, valid until the next layer's are.

    Attributes:
        rows: [T, H].
        top_k_index: [T, k].
        top_k_weight: float32 [T, k].
    """

    rows: Tensor
    top_k_index: NDArray[np.int64]
    top_k_weight: NDArray[np.float32]


class BufferedTransfer:
    """The buffers of one router, and its parts' way to the device; belongs to the engine's thread.

    Attributes:
        device: where the model is.
    """

    def __init__(self, memory: HostMemory) -> None:
        self.device = memory.device
        self._memory = memory
        self._buffers: dict[str, Tensor] = {}
        self._n_transferred = 0

    def to_host(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None],
    ) -> HostInputs:
        """Copy a layer's inputs to the host.

        Args:
            hidden: [T, H] on the device.
            top_k_index: [T, k] on the device.
            top_k_weight: [T, k] on the device.
            meanwhile: work for the device, begun behind the copies and not waited for.
        """
        rows = self._start_copy("rows", hidden.detach())  # [T, H]
        index = self._start_copy("index", top_k_index.detach().long())  # [T, k]
        weight = self._start_copy("weight", top_k_weight.detach().float())  # [T, k]
        wait = self._memory.record_event()
        while_waiting()
        wait()
        self._n_transferred = 0
        return HostInputs(rows, index.numpy(), weight.numpy())

    def to_device(self, host: Tensor) -> Tensor:
        """Return a host tensor on the device, without waiting for the copy.

        The host's may change at once: what is copied is a copy of it in a buffer of its own, which
        is free again once the next layer has landed.
        """
        buffer = self._buffer(f"part {self._n_transferred}", host)
        self._n_transferred += 1
        buffer.copy_(host)
        return buffer.to(self.device, non_blocking=True)

    copy_to_device = to_device

    def _start_copy(self, name: str, source: Tensor) -> Tensor:
        return self._buffer(name, source).copy_(source, non_blocking=True)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Return a buffer of the shape and dtype of a tensor."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < like.nbytes:
            size_bytes = max(MIN_BUFFER_BYTES, 1 << (like.nbytes - 1).bit_length())
            with torch.inference_mode(False):  # else only inference mode could write to it
                buffer = self._buffers[name] = self._memory.empty(size_bytes)
        return buffer[: like.nbytes].view(like.dtype).view(like.shape)


def transfer_for(device: torch.device) -> BufferedTransfer | None:
    """Return the stage of a router whose model is on `device`; None where that is the host."""
    return None if device.type == "cpu" else BufferedTransfer(PinnedMemory(device))
