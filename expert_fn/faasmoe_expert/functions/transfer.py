"""Copies between host and device through pinned memory.

`to_device` and `to_host` move the tensors of one frame; only `to_host` waits. `Uploader` copies
expert parameters from a mapped store in chunks: while the device copies one chunk, the next is read
from the mapping into another pinned buffer. A buffer is reused only when its copy has finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
N_BUFFERS = 2

WaitForCopy = Callable[[], None]
"""Blocks until an asynchronous copy has finished."""


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` asynchronously; returns it unchanged for the CPU."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the host, waiting for the device to compute it."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class CopyStream(Protocol):
    """A queue of copies from the host to one device."""

    @property
    def device(self) -> torch.device:
        """The target device."""

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        """Allocate pinned host memory, uint8 [size_bytes]."""

    def copy_async(self, target: Tensor, source: Tensor) -> WaitForCopy:
        """Start to copy `source`, uint8 [n] in a pinned buffer, to `target`, uint8 [n]."""

    def synchronize(self) -> None:
        """Wait for all copies; later work on the device sees their results."""


class CudaCopyStream:
    """A CUDA stream for copies, separate from the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        """Allocate pinned memory in this device's context, from any thread."""
        with torch.cuda.device(self.device):
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy_async(self, target: Tensor, source: Tensor) -> WaitForCopy:
        """Start to copy, after all work queued on the current stream, which may use `target`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event.synchronize

    def synchronize(self) -> None:
        """Wait for all copies on the stream."""
        self._stream.synchronize()


@dataclass(slots=True)
class _StagingBuffer:
    """A pinned buffer and the wait for the copy that reads it."""

    buffer: Tensor
    wait: WaitForCopy


class Uploader:
    """Copies host bytes to one device through reused pinned buffers. Not thread-safe.

    Args:
        stream: performs the copies.
        chunk_bytes: size of one buffer.
        n_buffers: number of buffers, at least 2 so that reading and copying overlap.

    Attributes:
        device: the target device.
    """

    def __init__(
        self, stream: CopyStream, *, chunk_bytes: int = CHUNK_BYTES, n_buffers: int = N_BUFFERS
    ) -> None:
        self.device = stream.device
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._n_buffers = n_buffers
        self._staging_buffers: deque[_StagingBuffer] = deque()

    def upload(self, target: Tensor, source: memoryview) -> None:
        """Copy bytes to the device; complete only after `synchronize`.

        Args:
            target: uint8 [n] on the device.
            source: n bytes on the host.
        """
        for start in range(0, len(source), self._chunk_bytes):
            part = source[start : start + self._chunk_bytes]
            staging = self._next_buffer()
            filled = staging.buffer[: len(part)]
            filled.copy_(torch.frombuffer(part, dtype=torch.uint8))
            staging.wait = self._stream.copy_async(target[start : start + len(part)], filled)

    def synchronize(self) -> None:
        """Wait for all uploads."""
        self._stream.synchronize()

    def _next_buffer(self) -> _StagingBuffer:
        """Return the least recently used buffer, after waiting for its copy."""
        if len(self._staging_buffers) < self._n_buffers:
            self._staging_buffers.append(
                _StagingBuffer(self._stream.pinned_buffer(self._chunk_bytes), lambda: None)
            )
            return self._staging_buffers[-1]
        self._staging_buffers.rotate(-1)
        self._staging_buffers[-1].wait()
        return self._staging_buffers[-1]


def uploader_for(device: torch.device) -> Uploader | None:
    """Return an uploader to `device`; None for the CPU, which computes on the mapping."""
    return None if device.type == "cpu" else Uploader(CudaCopyStream(device))
