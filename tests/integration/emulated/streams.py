"""Emulated CUDA streams, whose copies complete as late as CUDA allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GARBAGE = 0xFF
"""Byte pattern of memory that a pending copy has not reached; NaN in every floating dtype."""


class Race(AssertionError):
    """Memory was used without waiting for a copy."""


@dataclass(slots=True)
class PendingCopy:
    """An asynchronous copy.

    Attributes:
        target: target tensor.
        source: source tensor.
        data: content of the source when the copy started.
        to_host: whether the target is on the host, which must wait before reading it.
        is_applied: whether later operations on the stream see the copy.
        is_checked: whether the source was found unmodified and may change now.
    """

    target: Tensor
    source: Tensor
    data: Tensor
    to_host: bool
    is_applied: bool = False
    is_checked: bool = False

    def apply_on_device(self) -> None:
        """Make the copy visible to later operations on the device."""
        if not self.is_applied and not self.to_host:
            self.target.copy_(self.data)
        self.is_applied = True

    def complete(self) -> None:
        """Make the copy visible to the host; raises Race if its source was modified meanwhile."""
        self.apply_on_device()
        if self.to_host:
            self.target.copy_(self.data)
        elif not self.is_checked and not same_bytes(self.source, self.data):
            raise Race("pinned memory was overwritten before its copy to the device completed")
        self.is_checked = True

    def overlaps_source(self, memory: Tensor) -> bool:
        """Return whether the copy reads from the given host memory."""
        source, other = _range(self.source), _range(memory)
        return not self.to_host and source[0] < other[1] and other[0] < source[1]


@dataclass(slots=True)
class WaitCounts:
    """How often the host has waited for the device.

    Attributes:
        explicit: waits for events and streams.
        implicit: other waits: blocking copies, `item`, and shapes that depend on values.
    """

    explicit: int = 0
    implicit: int = 0

    def copy(self) -> WaitCounts:
        """Return a snapshot."""
        return WaitCounts(self.explicit, self.implicit)

    def __sub__(self, before: WaitCounts) -> WaitCounts:
        """Return the increase since an earlier snapshot."""
        return WaitCounts(self.explicit - before.explicit, self.implicit - before.implicit)


counts = WaitCounts()
_lock = threading.RLock()


@dataclass(eq=False)
class Stream:
    """A queue of asynchronous copies; computations run immediately."""

    device: Any = None
    priority: int = 0
    _copies: list[PendingCopy] = field(default_factory=list)

    def enqueue(self, copy: PendingCopy) -> None:
        """Queue a copy; its target contains garbage until the copy completes."""
        with _lock, torch.inference_mode():
            for pending in self._copies:
                if copy.to_host and pending.overlaps_source(copy.target):
                    pending.complete()  # the device reads this memory before overwriting it
            bytes_of(copy.target).fill_(GARBAGE if copy.target.is_contiguous() else -1)
            self._copies.append(copy)

    def apply_on_device(self) -> None:
        """Make all queued copies visible to later operations on this stream."""
        with _lock, torch.inference_mode():
            for copy in self._copies:
                copy.apply_on_device()

    def complete(self, last: PendingCopy | None = None) -> None:
        """Make queued copies visible to the host, up to `last` or all of them."""
        with _lock, torch.inference_mode():
            while self._copies:
                first = self._copies.pop(0)
                first.complete()
                if first is last:
                    return

    @property
    def last(self) -> PendingCopy | None:
        """The last pending copy, if any."""
        return self._copies[-1] if self._copies else None

    def is_pending(self, copy: PendingCopy) -> bool:
        """Return whether a copy is pending."""
        return any(pending is copy for pending in self._copies)

    def synchronize(self) -> None:
        """Wait for all queued copies."""
        counts.explicit += 1
        self.complete()

    def wait_stream(self, other: Stream) -> None:
        """Make copies of another stream visible to later operations on this one."""
        other.apply_on_device()

    def wait_event(self, event: Event) -> None:
        """Make copies before an event visible to later operations on this stream."""
        event.stream.apply_on_device()


DEFAULT = Stream()
_current = threading.local()


def current_stream(device: Any = None) -> Stream:
    """Return the current stream of this thread."""
    current: Stream = getattr(_current, "stream", DEFAULT)
    return current


@contextmanager
def stream(which: Stream) -> Iterator[None]:
    """Make a stream the current one of this thread for the lifetime of the context."""
    before = current_stream()
    _current.stream = which
    try:
        yield
    finally:
        _current.stream = before


class Event:
    """A position in a stream."""

    def __init__(self, **options: Any) -> None:
        self.stream = DEFAULT
        self._last: PendingCopy | None = None

    def record(self, on: Stream | None = None) -> None:
        """Record the current position of a stream, by default of the current one."""
        self.stream = current_stream() if on is None else on
        self._last = self.stream.last

    def synchronize(self) -> None:
        """Wait for all copies before the event."""
        counts.explicit += 1
        if self._last is not None and self.stream.is_pending(self._last):
            self.stream.complete(self._last)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous host tensor; another tensor is viewed as integers."""
    if tensor.is_contiguous():
        return tensor.view(-1).view(torch.uint8)
    return tensor.view(_INTEGERS[tensor.itemsize])


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return start and end address of a contiguous host tensor."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two host tensors with equal dtype and shape have the same bytes."""
    return torch.equal(one.view(_INTEGERS[one.itemsize]), other.view(_INTEGERS[other.itemsize]))
