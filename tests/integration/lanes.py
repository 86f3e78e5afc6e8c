"""Stand-ins for the copies to a CUDA device: the device is the CPU's own memory."""

from collections.abc import Callable

import torch
from torch import Tensor

CPU = torch.device("cpu")


class HostLane:
    """Copies at once."""

    device = CPU

    def buffer(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def finish(self) -> None:
        return None


class LateLane:
    """Copies as late as a device may: what was begun is carried out when it is waited for."""

    device = CPU

    def __init__(self) -> None:
        self.n_buffers = 0
        self.most_begun = 0
        self._begun: list[tuple[Tensor, Tensor]] = []

    def buffer(self, size_bytes: int) -> Tensor:
        self.n_buffers += 1
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        this = (target, source)
        self._begun.append(this)
        self.most_begun = max(self.most_begun, len(self._begun))
        return lambda: self._carry_out_to(this)

    def finish(self) -> None:
        self._carry_out(len(self._begun))

    def _carry_out_to(self, last: tuple[Tensor, Tensor]) -> None:
        """A stream is in order: all before it are over too."""
        places = [i for i, begun in enumerate(self._begun) if begun is last]
        self._carry_out(places[0] + 1 if places else 0)

    def _carry_out(self, count: int) -> None:
        for target, source in self._begun[:count]:
            target.copy_(source)
        del self._begun[:count]
