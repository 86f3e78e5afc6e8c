"""What a sandbox's pod requests, by what is attached to it. Pure.

A generic sandbox needs its runtime's memory and hardly any CPU. One with functions needs theirs
too, and its compute threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PodRequests:
    """Requests of a pod's only container.

    Attributes:
        cpu_millis: CPU, in thousandths of a core.
        memory_bytes: memory.
    """

    cpu_millis: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ResizePolicy:
    """Requests that follow what is attached.

    Attributes:
        idle: of a sandbox without functions.
        full: of one with as many functions as it holds, each as large as the largest.
    """

    idle: PodRequests
    full: PodRequests

    def requests(self, function_bytes: Iterable[int]) -> PodRequests:
        """Return the requests of a sandbox that holds functions of these sizes."""
        sizes = tuple(function_bytes)
        if not sizes:
            return self.idle
        memory_bytes = self.idle.memory_bytes + sum(sizes)
        return PodRequests(self.full.cpu_millis, min(memory_bytes, self.full.memory_bytes))
