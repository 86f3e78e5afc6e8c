"""One frame's tensors to a device and back: through pinned memory, waited for once, at the end.

Bytes of a mapped store on their way to a device: read, pinned and copied in chunks, overlapped.

While the device copies one chunk, the next one is read from the map into another pinned buffer. A
buffer is filled again only once the copy that read it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`, perhaps still on its way; nothing to do on the CPU."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a device's tensor on the host, contiguous, once it is computed."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


CHUNK_BYTES = 16 << 20
N_BUFFERS = 2

WaitForCopy = Callable[[], None]


class CopyStream(Protocol):
    """What copies from host to device."""

    @property
    def device(self) -> torch.device:
        """Where it copies to."""

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        """Return uint8 host memory that the device copies from, [size_bytes]."""

    def copy_async(self, target: Tensor, source: Tensor) -> WaitForCopy:
        """Begin to copy a buffer's bytes to the device; return what waits for it."""

    def synchronize(self) -> None:
        """Wait for all copies: what the device does next sees them."""


class CudaCopyStream:
    """A stream of its own on a CUDA device, beside that on which it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        """Return pinned memory; in any thread that of this device's context."""
        with torch.cuda.device(self.device):
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy_async(self, target: Tensor, source: Tensor) -> WaitForCopy:
        """Begin to copy, behind whatever used the target's memory before."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event.synchronize

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


@dataclass(slots=True)
class _StagingBuffer:
    """A buffer, and what waits until it may be filled again."""

    buffer: Tensor
    wait: WaitForCopy


class Uploader:
    """Copies to one device, `device`. Keeps its buffers; belongs to one thread.

    Args:
        lane: what copies.
        chunk_bytes: size of a buffer.
        n_buffers: buffers, 2 or more, so that reading and copying overlap.
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
        """Copy bytes to the device; the last ones may be on their way until `finish`.

        Args:
            target: uint8 [n] on the device.
            source: as many bytes.
        """
        for start in range(0, len(source), self._chunk_bytes):
            part = source[start : start + self._chunk_bytes]
            staging = self._next_buffer()
            filled = staging.buffer[: len(part)]
            filled.copy_(torch.frombuffer(part, dtype=torch.uint8))
            staging.wait = self._stream.copy_async(target[start : start + len(part)], filled)

    def synchronize(self) -> None:
        """Wait for all that was put."""
        self._stream.synchronize()

    def _next_buffer(self) -> _StagingBuffer:
        """Return the slot that was used longest ago, free to be filled."""
        if len(self._staging_buffers) < self._n_buffers:
            self._staging_buffers.append(
                _StagingBuffer(self._stream.pinned_buffer(self._chunk_bytes), lambda: None)
            )
            return self._staging_buffers[-1]
        self._staging_buffers.rotate(-1)
        self._staging_buffers[-1].wait()
        return self._staging_buffers[-1]


def uploader_for(device: torch.device) -> Uploader | None:
    """Return what copies functions to a device; None for the CPU, which computes on the map."""
    return None if device.type == "cpu" else Uploader(CudaCopyStream(device))
