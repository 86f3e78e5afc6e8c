"""Stand-ins for the copies to a CUDA device: the device is the CPU's own memory."""

from collections.abc import Callable

import torch
from torch import Tensor

CPU = torch.device("cpu")


class FakeCopyStream:
    """Copies at once."""

    device = CPU

    def pinned_buffer(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy_async(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def synchronize(self) -> None:
        return None


class DeferredCopyStream:
    """Copies as late as a device may: what was begun is carried out when it is waited for."""

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
        """A stream is in order: all before it are over too."""
        positions = [i for i, begun in enumerate(self._pending) if begun is last]
        self._complete(positions[0] + 1 if positions else 0)

    def _complete(self, count: int) -> None:
        for target, source in self._pending[:count]:
            target.copy_(source)
        del self._pending[:count]
