"""Streams, and copies on them that are as late as they may be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GARBAGE = 0xFF
"""What is read of memory that a copy has not reached: not a number in every floating dtype."""


class Race(AssertionError):
    """Memory was used before a copy of it was waited for."""


@dataclass(slots=True)
class PendingCopy:
    """A copy that was begun.

    Attributes:
        target: where to.
        source: where from.
        data: the source's bytes when it was begun.
        to_host: whether the host reads the target, and so must wait.
        arrived: whether what follows on the stream sees it.
        checked: whether its source need not stay any longer.
    """

    target: Tensor
    source: Tensor
    data: Tensor
    to_host: bool
    is_applied: bool = False
    is_checked: bool = False

    def apply_on_device(self) -> None:
        """Let the device see it."""
        if not self.is_applied and not self.to_host:
            self.target.copy_(self.data)
        self.is_applied = True

    def complete(self) -> None:
        """Let the host see it; raises Race if the host wrote to what was read meanwhile."""
        self.apply_on_device()
        if self.to_host:
            self.target.copy_(self.data)
        elif not self.is_checked and not same_bytes(self.source, self.data):
            raise Race("pinned memory was overwritten before its copy to the device was over")
        self.is_checked = True

    def overlaps_source(self, memory: Tensor) -> bool:
        """Whether it reads some of that host memory."""
        mine, other = _range(self.source), _range(memory)
        return not self.to_host and mine[0] < other[1] and other[0] < mine[1]


@dataclass(slots=True)
class WaitCounts:
    """How often the host has waited for the device: through events and streams, and otherwise.

    What is otherwise waited for: a blocking copy, `item`, a size that depends on values.
    """

    explicit: int = 0
    implicit: int = 0

    def copy(self) -> WaitCounts:
        """Return them as they are now."""
        return WaitCounts(self.explicit, self.implicit)

    def __sub__(self, before: WaitCounts) -> WaitCounts:
        """Return what was added since."""
        return WaitCounts(self.explicit - before.explicit, self.implicit - before.implicit)


counts = WaitCounts()
_lock = threading.RLock()


@dataclass(eq=False)
class Stream:
    """A queue of copies. What is computed on it is computed at once."""

    device: Any = None
    priority: int = 0
    _copies: list[PendingCopy] = field(default_factory=list)

    def enqueue(self, copy: PendingCopy) -> None:
        """Queue a copy; its target is garbage until it arrives."""
        with _lock, torch.inference_mode():
            for pending in self._copies:
                if copy.to_host and pending.overlaps_source(copy.target):
                    pending.complete()  # the device reads it before it writes to it
            bytes_of(copy.target).fill_(GARBAGE if copy.target.is_contiguous() else -1)
            self._copies.append(copy)

    def apply_on_device(self) -> None:
        """Let what follows on this stream see all that was begun."""
        with _lock, torch.inference_mode():
            for copy in self._copies:
                copy.apply_on_device()

    def complete(self, last: PendingCopy | None = None) -> None:
        """Let the host see what was begun, up to `last` or all of it."""
        with _lock, torch.inference_mode():
            while self._copies:
                first = self._copies.pop(0)
                first.complete()
                if first is last:
                    return

    @property
    def last(self) -> PendingCopy | None:
        """The copy that was begun last, if one is not over."""
        return self._copies[-1] if self._copies else None

    def is_pending(self, copy: PendingCopy) -> bool:
        """Whether a copy is not over."""
        return any(pending is copy for pending in self._copies)

    def synchronize(self) -> None:
        """Wait for all of it."""
        counts.explicit += 1
        self.complete()

    def wait_stream(self, other: Stream) -> None:
        """Let what follows here see what was begun on the other one."""
        other.apply_on_device()

    def wait_event(self, event: Event) -> None:
        """Let what follows here see what was begun before the event."""
        event.stream.apply_on_device()


DEFAULT = Stream()
_current = threading.local()


def current_stream(device: Any = None) -> Stream:
    """Return this thread's stream."""
    found: Stream = getattr(_current, "stream", DEFAULT)
    return found


@contextmanager
def stream(which: Stream) -> Iterator[None]:
    """Make it this thread's stream."""
    before = current_stream()
    _current.stream = which
    try:
        yield
    finally:
        _current.stream = before


class Event:
    """A place on a stream."""

    def __init__(self, **options: Any) -> None:
        self.stream = DEFAULT
        self._last: PendingCopy | None = None

    def record(self, on: Stream | None = None) -> None:
        """Mark what was begun so far."""
        self.stream = current_stream() if on is None else on
        self._last = self.stream.last

    def synchronize(self) -> None:
        """Wait for what was begun before it."""
        counts.explicit += 1
        if self._last is not None and self.stream.is_pending(self._last):
            self.stream.complete(self._last)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return a host tensor's bytes, if they are one piece; else itself, viewed as integers."""
    if tensor.is_contiguous():
        return tensor.view(-1).view(torch.uint8)
    return tensor.view(_INTEGERS[tensor.itemsize])


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return where a contiguous host tensor begins and ends."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two host tensors of one dtype and shape have the same bytes."""
    return torch.equal(one.view(_INTEGERS[one.itemsize]), other.view(_INTEGERS[other.itemsize]))
