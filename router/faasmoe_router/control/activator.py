"""Which functions to ask for and when: one wake however many wait. Pure: the time is passed in.

Sending wakes: at once, one for all who wait.

The cold-start gate: requests wait in front of the engine until their functions are there.

A prompt's functions are known well enough before it runs (dispatch/routing.py), so one request that
finds them at zero asks for all of them together, and waits here, where it costs a future, and not
in the engine, where it would stop everybody's batch in every layer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import (
    ActivationQueueFull,
    ActivationTimeout,
    ControlError,
    EngineUnavailable,
)

logger = logging.getLogger(__name__)


ACTIVATION_REPEAT_S = 1.0  # in case the control process was restarted and has forgotten


class PendingActivations:
    """Functions that are wanted, in the order in which they were, and those asked for lately."""

    def __init__(self, repeat_s: float = ACTIVATION_REPEAT_S) -> None:
        self._repeat_s = repeat_s
        self._pending: dict[str, None] = {}
        self._requested_s: dict[str, float] = {}

    def add(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, at once or, if they were asked for lately, when that has passed."""
        self._pending.update(dict.fromkeys(function_ids))

    def pop_due(self, now_s: float) -> list[str]:
        """Return the functions to ask for now; they count as asked for."""
        due = [name for name in self._pending if self._due_s(name) <= now_s]
        for name in due:
            del self._pending[name]
            self._requested_s[name] = now_s
        return due

    def next_due_s(self) -> float:
        """Return when the next function is due; infinity if none is wanted."""
        return min(map(self._due_s, self._pending), default=math.inf)

    def retain(self, missing: Collection[str]) -> None:
        """Forget the functions that are not missing any more."""
        self._pending = {name: None for name in self._pending if name in missing}
        self._requested_s = {name: s for name, s in self._requested_s.items() if name in missing}

    def reset_requested(self) -> None:
        """Ask anew at the next wish: whoever was asked is not there any more."""
        self._requested_s.clear()

    def _due_s(self, name: str) -> float:
        requested_s = self._requested_s.get(name)
        return -math.inf if requested_s is None else requested_s + self._repeat_s


class ActivationRequester:
    """Asks the control plane for functions. Belongs to the event loop, but for `want_soon`."""

    def __init__(
        self,
        client: ControlClient,
        *,
        router_name: str,
        metrics: ControlLinkMetrics,
        repeat_s: float = ACTIVATION_REPEAT_S,
    ) -> None:
        self._client = client
        self._router_name = router_name
        self._metrics = metrics
        self._pending = PendingActivations(repeat_s)
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_failing = False

    def request(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, unless that was done lately."""
        self._pending.add(function_ids)
        self._changed.set()

    def request_threadsafe(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, from any thread; ignored while nothing runs."""
        loop, ids = self._loop, list(function_ids)
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.request, ids)

    def retain_missing(self, missing: Collection[str]) -> None:
        """Ask only for these from now on: the others have addresses."""
        self._pending.retain(missing)

    def reset_requested(self) -> None:
        """Forget who was asked: another control process has begun."""
        self._pending.reset_requested()

    async def run(self, missing: Callable[[], Collection[str]]) -> None:
        """Send wakes until cancelled.

        Args:
            missing: tells which functions have no address; others are not asked for.
        """
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wait_until_due()
                self._pending.retain(set(missing()))
                if due := self._pending.pop_due(time.monotonic()):
                    await self._send(due)
        finally:
            self._loop = None

    async def _wait_until_due(self) -> None:
        self._changed.clear()
        left_s = self._pending.next_due_s() - time.monotonic()
        if left_s <= 0:
            return
        try:
            async with asyncio.timeout(None if math.isinf(left_s) else left_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _send(self, function_ids: list[str]) -> None:
        body = {"router": self._router_name, "sent_at_s": time.time(), "functions": function_ids}
        self._metrics.activation_requests.inc()
        try:
            await self._client.request_activation(body)
        except ControlError as error:
            if not self._is_failing:
                logger.warning(
                    "An activation request for %d functions failed: %s", len(function_ids), error
                )
            self._is_failing = True
        else:
            self._is_failing = False


@dataclass(frozen=True, slots=True)
class ActivationQueueLimits:
    """How much may wait, and for how long.

    Attributes:
        max_requests: requests that are held at once.
        max_bytes: their bodies' bytes, together.
        timeout_s: how long a request is held.
    """

    max_requests: int = 1024
    max_bytes: int = 64 << 20
    timeout_s: float = 30.0


class FunctionAvailability(Protocol):
    """What tells whether a request's functions can be called."""

    @property
    def activated_below_tokens(self) -> float:
        """Requests of fewer tokens than this lack no function."""

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions that so many tokens need and that have no address."""

    async def enable_local_fallback(self, n_tokens: int) -> bool:
        """Compute what so many tokens lack in the router; return whether that can be done."""


class Activator:
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
        functions: FunctionAvailability,
        *,
        request_activation: Callable[[Sequence[str]], None],
        limits: ActivationQueueLimits,
        metrics: ControlLinkMetrics,
        load: LoadMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._request_activation = request_activation
        self._limits = limits
        self._metrics = metrics
        self._load = load
        self._clock = clock
        self._queued: dict[asyncio.Future[None], int] = {}  # each one's tokens
        self._queued_bytes = 0
        self._max_tokens = 0
        self._awaited: Sequence[str] = ()
        self._is_closed = False

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return whether a request of so many tokens lacks no function."""
        return n_tokens < self._functions.activated_below_tokens

    async def wait_for_activation(self, n_tokens: int, *, size_bytes: int) -> float:
        """Wait until a request lacks no function, or the router stands in for what it lacks.

        Returns:
            For how long, in seconds.

        Raises:
            ActivationTimeout: its functions were not there in time.
            StoreCorrupted: what was not there in time is damaged here too.
            HoldQueueFull: too much waits already.
            EngineUnavailable: the gate was closed.
        """
        self._check_capacity(size_bytes)
        started_s = self._clock()
        with self._queue_slot(n_tokens, size_bytes) as waiter:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    await waiter
            except TimeoutError:
                await self._fall_back_locally(n_tokens)
        waited_s = self._clock() - started_s
        self._metrics.cold_start_seconds.observe(waited_s)
        return waited_s

    async def _fall_back_locally(self, n_tokens: int) -> None:
        if not await self._functions.enable_local_fallback(n_tokens):
            raise ActivationTimeout(
                f"the model's functions could not be started within {self._limits.timeout_s:g} s"
            )
        self.on_table_changed()  # for the others that lack the same

    def on_table_changed(self) -> None:
        """Let the requests go that lack nothing any more."""
        for waiter, n_tokens in self._queued.items():
            if self.is_activated_for(n_tokens) and not waiter.done():
                waiter.set_result(None)
        self._update_awaited()
        self.repeat_request()

    def repeat_request(self) -> None:
        """Ask once more for what is waited for."""
        if self._awaited:
            self._request_activation(self._awaited)

    def close(self) -> None:
        """Refuse the requests that are held, and those that would be from now on."""
        self._is_closed = True
        for waiter in self._queued:
            if not waiter.done():
                waiter.set_exception(EngineUnavailable("the server is shutting down"))

    def _check_capacity(self, size_bytes: int) -> None:
        if self._is_closed:
            raise EngineUnavailable("the server is shutting down")
        limits = self._limits
        if len(self._queued) >= limits.max_requests:
            raise ActivationQueueFull(
                f"{len(self._queued)} requests are queued for activation, "
                f"the limit is {limits.max_requests}"
            )
        if self._queued_bytes + size_bytes > limits.max_bytes:
            raise ActivationQueueFull(
                f"{self._queued_bytes} bytes of requests are queued for activation; "
                f"this request would exceed the limit of {limits.max_bytes} bytes"
            )

    @contextmanager
    def _queue_slot(self, n_tokens: int, size_bytes: int) -> Iterator[asyncio.Future[None]]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queued[waiter] = n_tokens
        self._queued_bytes += size_bytes
        self._update_metrics()
        if n_tokens > self._max_tokens:
            self._update_awaited()
            self.repeat_request()
        try:
            yield waiter
        finally:
            del self._queued[waiter]
            self._queued_bytes -= size_bytes
            self._update_metrics()
            if not self._queued:
                self._update_awaited()

    def _update_metrics(self) -> None:
        self._load.queued = len(self._queued)
        self._metrics.queued_requests.set(len(self._queued))

    def _update_awaited(self) -> None:
        """Bring what is waited for, and its load, up to date."""
        self._max_tokens = max(self._queued.values(), default=0)
        previous, self._awaited = self._awaited, self._functions.missing_for(self._max_tokens)
        now_s = self._clock()
        for name in set(previous).difference(self._awaited):
            self._load.record_end(name, now_s)
        for name in set(self._awaited).difference(previous):
            self._load.record_queued(name, now_s)
