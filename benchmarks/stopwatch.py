"""Where a decode step's time goes on our side: timers laid around the parts of dispatch.

They are laid at run time and taken off again, so that the product's code carries none.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.step_parts import (
    BACK,
    CALLS,
    COMBINE,
    ENCODE,
    GROUP,
    HERE,
    LAND,
    TAKE,
    TIMERS,
    WAIT,
    WHOLE,
)

from faasmoe_router.dispatch import dispatcher
from faasmoe_router.dispatch import round as round_module
from faasmoe_router.dispatch.batch import LayerBatch
from faasmoe_router.dispatch.dispatcher import Dispatcher
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.staging import HostStage

_PARTS: tuple[tuple[Any, str, str], ...] = (
    (Dispatcher, "compute", WHOLE),
    (dispatcher, "group_pairs", GROUP),
    (LayerBatch, "frame", ENCODE),
    (Fanout, "run", CALLS),
    (LayerBatch, "take", TAKE),
    (LayerBatch, "compute", HERE),
    (LayerBatch, "result", COMBINE),
    (HostStage, "land", LAND),
    (HostStage, "bring", BACK),
)


class Stopwatch:
    """Seconds spent in each part of dispatch, inner parts counted in outer ones too."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(TIMERS, 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure as long as the context lasts."""
        with ExitStack() as stack:
            for owner, name, part in _PARTS:
                stack.enter_context(_replaced(owner, name, self._timed(getattr(owner, name), part)))
            stack.enter_context(_replaced(round_module, "select", _Select(self)))
            yield

    def add(self, part: str, begun_s: float) -> None:
        """Count the time since `begun_s`, on the performance counter."""
        self.seconds[part] += time.perf_counter() - begun_s

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(part, begun_s)

        return timed


class _Select:
    """Stands in for the select module: its poll objects are timed while they wait."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def __getattr__(self, name: str) -> Any:
        return getattr(select, name)

    def poll(self) -> _Poll:
        return _Poll(select.poll(), self._stopwatch)


class _Poll:
    def __init__(self, poll: Any, stopwatch: Stopwatch) -> None:
        self._poll = poll
        self._stopwatch = stopwatch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poll, name)

    def poll(self, timeout_ms: float) -> Any:
        begun_s = time.perf_counter()
        events = self._poll.poll(timeout_ms)
        self._stopwatch.add(WAIT, begun_s)
        return events


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
