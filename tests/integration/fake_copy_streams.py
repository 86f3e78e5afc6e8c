"""Fake copy streams whose device is the CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

CPU = torch.device("cpu")


class FakeCopyStream:
    """Copies immediately."""

    device = CPU

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy_async(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def synchronize(self) -> None:
        return None


class DeferredCopyStream:
    """Copies as late as a device may: only when the caller waits.

    Attributes:
        n_buffers: number of buffers allocated.
        max_pending: maximum number of copies that were pending at the same time.
    """

    device = CPU

    def __init__(self) -> None:
        self.n_buffers = 0
        self.max_pending = 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        self.n_buffers += 1
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy_async(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        pending = (target, source)
        self._pending.append(pending)
        self.max_pending = max(self.max_pending, len(self._pending))
        return lambda: self._complete_through(pending)

    def synchronize(self) -> None:
        self._complete(len(self._pending))

    def _complete_through(self, last: tuple[Tensor, Tensor]) -> None:
        """Complete a copy and all earlier ones, since a stream executes in order."""
        positions = [i for i, copy in enumerate(self._pending) if copy is last]
        self._complete(positions[0] + 1 if positions else 0)

    def _complete(self, count: int) -> None:
        for target, source in self._pending[:count]:
            target.copy_(source)
        del self._pending[:count]
