"""Profiles dispatch within a decode step, by timers around its functions.

The timers are patched in at run time and removed again, so the product's code contains none.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.step_breakdown import (
    ADD_RESPONSE,
    COLOCATED,
    DISPATCH,
    ENCODE,
    FANOUT,
    FINISH_REDUCTION,
    GROUP_PAIRS,
    TIMERS,
    TO_HOST,
    TO_ROUTER_DEVICE,
    WAIT_FOR_SANDBOXES,
)

from faasmoe_router.dispatch import dispatcher
from faasmoe_router.dispatch import fanout as fanout_module
from faasmoe_router.dispatch.device_transfer import BufferedTransfer
from faasmoe_router.dispatch.dispatcher import Dispatcher
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.layer_batch import LayerBatch

_TIMED_FUNCTIONS: tuple[tuple[Any, str, str], ...] = (
    (Dispatcher, "compute", DISPATCH),
    (dispatcher, "group_pairs", GROUP_PAIRS),
    (LayerBatch, "request_frame", ENCODE),
    (Fanout, "run", FANOUT),
    (LayerBatch, "add_response", ADD_RESPONSE),
    (LayerBatch, "compute_locally", COLOCATED),
    (LayerBatch, "result", FINISH_REDUCTION),
    (BufferedTransfer, "to_host", TO_HOST),
    (BufferedTransfer, "to_device", TO_ROUTER_DEVICE),
)


class DispatchProfiler:
    """Measures the seconds spent in each part of dispatch; nested parts count in outer ones too.

    Attributes:
        seconds: total seconds by part.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(TIMERS, 0.0)

    @contextmanager
    def profiling(self) -> Iterator[None]:
        """Measure while the context is active."""
        with ExitStack() as stack:
            for owner, name, part in _TIMED_FUNCTIONS:
                stack.enter_context(_patched(owner, name, self._timed(getattr(owner, name), part)))
            stack.enter_context(_patched(fanout_module, "select", _TimedSelect(self)))
            yield

    def add_time(self, part: str, started_s: float) -> None:
        """Add the time since `started_s`, on the performance counter, to a part."""
        self.seconds[part] += time.perf_counter() - started_s

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add_time(part, started_s)

        return timed


class _TimedSelect:
    """Replaces the `select` module with one whose poll objects time their waits."""

    def __init__(self, profiler: DispatchProfiler) -> None:
        self._profiler = profiler

    def __getattr__(self, name: str) -> Any:
        return getattr(select, name)

    def poll(self) -> _TimedPoll:
        return _TimedPoll(select.poll(), self._profiler)


class _TimedPoll:
    def __init__(self, poll: Any, profiler: DispatchProfiler) -> None:
        self._poll = poll
        self._profiler = profiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poll, name)

    def poll(self, timeout_ms: float) -> Any:
        started_s = time.perf_counter()
        events = self._poll.poll(timeout_ms)
        self._profiler.add_time(WAIT_FOR_SANDBOXES, started_s)
        return events


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
