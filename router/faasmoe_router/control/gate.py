"""The cold-start gate: requests wait in front of the engine until their functions are there.

A prompt's functions are known well enough before it runs (dispatch/needs.py), so one request that
finds them at zero asks for all of them together, and waits here, where it costs a future, and not
in the engine, where it would stop everybody's batch in every layer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import ActivationTimeout, EngineUnavailable, HoldQueueFull


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """How much may wait, and for how long.

    Attributes:
        max_requests: requests that are held at once.
        max_bytes: their bodies' bytes, together.
        timeout_s: how long a request is held.
    """

    max_requests: int = 1024
    max_bytes: int = 64 << 20
    timeout_s: float = 30.0


class Functions(Protocol):
    """What tells whether a request's functions can be called."""

    @property
    def complete_below(self) -> float:
        """Requests of fewer tokens than this lack no function."""

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions that so many tokens need and that have no address."""

    async def stand_in_for(self, n_tokens: int) -> bool:
        """Compute what so many tokens lack in the router; return whether that can be done."""


class ColdStartGate:
    """Holds requests. Belongs to the event loop.

    Args:
        functions: which functions are missing.
        wake: asks for functions; doing so again is harmless.
        limits: how much may wait.
        metrics: counters.
        load: where functions that are waited for count as called: once each, however many wait,
            since their requests will share one call.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        functions: Functions,
        *,
        wake: Callable[[Sequence[str]], None],
        limits: HoldLimits,
        metrics: ControlMetrics,
        load: LoadMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._wake = wake
        self._limits = limits
        self._metrics = metrics
        self._load = load
        self._clock = clock
        self._held: dict[asyncio.Future[None], int] = {}  # each one's tokens
        self._held_bytes = 0
        self._most_tokens = 0
        self._wanted: Sequence[str] = ()
        self._closed = False

    def is_open_for(self, n_tokens: int) -> bool:
        """Return whether a request of so many tokens lacks no function."""
        return n_tokens < self._functions.complete_below

    async def hold(self, n_tokens: int, *, size_bytes: int) -> float:
        """Wait until a request lacks no function, or the router stands in for what it lacks.

        Returns:
            For how long, in seconds.

        Raises:
            ActivationTimeout: its functions were not there in time.
            StoreCorrupted: what was not there in time is damaged here too.
            HoldQueueFull: too much waits already.
            EngineUnavailable: the gate was closed.
        """
        self._check_room(size_bytes)
        began_s = self._clock()
        with self._place(n_tokens, size_bytes) as turn:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    await turn
            except TimeoutError:
                await self._stand_in(n_tokens)
        waited_s = self._clock() - began_s
        self._metrics.cold_start_seconds.observe(waited_s)
        return waited_s

    async def _stand_in(self, n_tokens: int) -> None:
        if not await self._functions.stand_in_for(n_tokens):
            raise ActivationTimeout(
                f"the model's functions could not be started within {self._limits.timeout_s:g} s"
            )
        self.table_changed()  # for the others that lack the same

    def table_changed(self) -> None:
        """Let the requests go that lack nothing any more."""
        for turn, n_tokens in self._held.items():
            if self.is_open_for(n_tokens) and not turn.done():
                turn.set_result(None)
        self._want()
        self.wake_again()

    def wake_again(self) -> None:
        """Ask once more for what is waited for."""
        if self._wanted:
            self._wake(self._wanted)

    def close(self) -> None:
        """Refuse the requests that are held, and those that would be from now on."""
        self._closed = True
        for turn in self._held:
            if not turn.done():
                turn.set_exception(EngineUnavailable("the server ends"))

    def _check_room(self, size_bytes: int) -> None:
        if self._closed:
            raise EngineUnavailable("the server ends")
        limits = self._limits
        if len(self._held) >= limits.max_requests:
            raise HoldQueueFull(
                f"{len(self._held)} requests wait for the model's functions to be started, "
                f"at most {limits.max_requests} may"
            )
        if self._held_bytes + size_bytes > limits.max_bytes:
            raise HoldQueueFull(
                f"{self._held_bytes} bytes of requests wait for the model's functions to be "
                f"started, with yours more than {limits.max_bytes} would"
            )

    @contextmanager
    def _place(self, n_tokens: int, size_bytes: int) -> Iterator[asyncio.Future[None]]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held[turn] = n_tokens
        self._held_bytes += size_bytes
        self._count()
        if n_tokens > self._most_tokens:
            self._want()
            self.wake_again()
        try:
            yield turn
        finally:
            del self._held[turn]
            self._held_bytes -= size_bytes
            self._count()
            if not self._held:
                self._want()

    def _count(self) -> None:
        self._load.held = len(self._held)
        self._metrics.held_requests.set(len(self._held))

    def _want(self) -> None:
        """Bring what is waited for, and its load, up to date."""
        self._most_tokens = max(self._held.values(), default=0)
        before, self._wanted = self._wanted, self._functions.missing_for(self._most_tokens)
        now_s = self._clock()
        for name in set(before).difference(self._wanted):
            self._load.end(name, now_s)
        for name in set(self._wanted).difference(before):
            self._load.hold(name, now_s)
