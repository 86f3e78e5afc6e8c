"""The nodes' memory: what is placed where, and what a lost node takes with it.

As the Kubernetes scheduler: with the MostAllocated strategy, which suits nodes that are given back,
a pod goes to the fullest node that it fits in, with LeastAllocated to the emptiest one. Memory is
reserved by a pod's request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.simulation.events import EventLoop, Integral


@dataclass(slots=True, eq=False)
class Pod:
    """A placed pod; one that spans several nodes has one entry for each.

    Attributes:
        request_bytes: memory reserved in each of its nodes.
        nodes: its nodes.
        on_lost: called once if one of them is lost.
    """

    request_bytes: int
    on_lost: Callable[[], None]
    nodes: tuple[_Node, ...] = ()


@dataclass(slots=True, eq=False)
class _Node:
    index: int
    free_bytes: int
    pods: dict[Pod, None] = field(default_factory=dict)
    is_lost: bool = False


class Nodes:
    """All nodes.

    Args:
        loop: the clock.
        count: number of nodes.
        memory_bytes: memory of each.
        is_spreading: LeastAllocated instead of MostAllocated.
    """

    def __init__(
        self, loop: EventLoop, count: int, memory_bytes: int, *, is_spreading: bool = False
    ) -> None:
        self._is_spreading = is_spreading
        self.memory_bytes = memory_bytes
        self._nodes = [_Node(index, memory_bytes) for index in range(count)]
        self._unused = dict.fromkeys(self._nodes)  # the least index first at the start
        self._used: dict[_Node, None] = {}
        self.in_use = Integral(loop)
        """Nodes that hold any pod."""
        self.reserved_bytes = Integral(loop)
        """Memory reserved in all nodes."""
        self.max_used_bytes = 0
        """Highest memory reserved in one node so far."""

    def place(self, pod: Pod, *, n_nodes: int = 1) -> bool:
        """Reserve a pod's memory in `n_nodes` nodes; False, and nothing, if it does not fit."""
        size = pod.request_bytes
        if size > self.memory_bytes:
            return False
        fitting = [node for node in self._used if node.free_bytes >= size]
        unused = itertools.islice(self._unused, n_nodes)
        if self._is_spreading:
            fitting.sort(key=lambda node: (-node.free_bytes, node.index))
            fitting = [*unused, *fitting]
        else:
            fitting.sort(key=lambda node: (node.free_bytes, node.index))
            fitting += unused
        if len(fitting) < n_nodes:
            return False
        pod.nodes = tuple(fitting[:n_nodes])
        for node in pod.nodes:
            self._reserve(node, pod)
        return True

    def remove(self, pod: Pod) -> None:
        """Give a pod's memory back."""
        for node in pod.nodes:
            del node.pods[pod]
            node.free_bytes += pod.request_bytes
            self.reserved_bytes.add(-pod.request_bytes)
            if not node.pods:
                self.in_use.add(-1)
                del self._used[node]
                if not node.is_lost:
                    self._unused[node] = None
        pod.nodes = ()

    def lose_fullest(self) -> bool:
        """Lose the node with the most memory in use, and all pods on it; False if none is used."""
        if not self._used:
            return False
        node = min(self._used, key=lambda node: (node.free_bytes, node.index))
        node.is_lost = True
        pods = list(node.pods)
        for pod in pods:
            self.remove(pod)
        for pod in pods:
            pod.on_lost()
        return True

    def _reserve(self, node: _Node, pod: Pod) -> None:
        if not node.pods:
            del self._unused[node]
            self._used[node] = None
            self.in_use.add(1)
        node.pods[pod] = None
        node.free_bytes -= pod.request_bytes
        self.max_used_bytes = max(self.max_used_bytes, self.memory_bytes - node.free_bytes)
        self.reserved_bytes.add(pod.request_bytes)
