"""Transfers between the model's device and the host memory that functions are called with.

On a GPU, a layer's rows and routing are copied into pinned buffers: all copies are started
together and waited for once. Function outputs are copied back one by one without waiting, and
reduced on the device (layer_batch.py). A buffer is overwritten only after the next layer's wait,
which is ordered behind everything the previous layer started. Buffers grow and are kept, because
pinning takes longer than copying.
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


@dataclass(frozen=True, slots=True)
class HostInputs:
    """A layer's inputs on the host, valid until the next call of `to_host`.

    Attributes:
        rows: hidden states, [T, H].
        top_k_index: expert indices, int64 [T, k].
        top_k_weight: routing weights, float32 [T, k].
    """

    rows: Tensor
    top_k_index: NDArray[np.int64]
    top_k_weight: NDArray[np.float32]


class BufferedTransfer:
    """Transfers through reusable host buffers; belongs to the engine's thread.

    Attributes:
        device: the model's device.
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
            while_waiting: enqueues device work behind the copies; that work is not waited for.
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

        `host` may change as soon as this returns: the device copies from a separate buffer, which
        is reused only after the next `to_host`.
        """
        buffer = self._buffer(f"output {self._n_transferred}", host)
        self._n_transferred += 1
        buffer.copy_(host)
        return buffer.to(self.device, non_blocking=True)

    copy_to_device = to_device

    def _start_copy(self, name: str, source: Tensor) -> Tensor:
        return self._buffer(name, source).copy_(source, non_blocking=True)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Return the named buffer as a tensor of the shape and dtype of `like`."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < like.nbytes:
            size_bytes = max(MIN_BUFFER_BYTES, 1 << (like.nbytes - 1).bit_length())
            with torch.inference_mode(False):  # an inference tensor is read-only outside that mode
                buffer = self._buffers[name] = self._memory.empty(size_bytes)
        return buffer[: like.nbytes].view(like.dtype).view(like.shape)


class HostMemory(Protocol):
    """Allocates host memory that a device copies to and from, and records device events."""

    @property
    def device(self) -> torch.device:
        """The device."""

    def empty(self, size_bytes: int) -> Tensor:
        """Return uninitialised host memory, uint8 [size_bytes]."""

    def record_event(self) -> Callable[[], None]:
        """Record an event behind the work started so far; return a function that waits for it."""


class PinnedMemory:
    """Page-locked host memory of a CUDA device, and events on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, size_bytes: int) -> Tensor:
        """Return uninitialised pinned memory, uint8 [size_bytes]."""
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def record_event(self) -> Callable[[], None]:
        """Record a CUDA event; return its `synchronize`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize


def transfer_for(device: torch.device) -> BufferedTransfer | None:
    """Return the transfer of a router whose model is on `device`, None for the host."""
    return None if device.type == "cpu" else BufferedTransfer(PinnedMemory(device))
