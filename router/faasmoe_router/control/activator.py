"""The activator: queues requests whose functions are at zero and asks for their activation.

The functions that a prompt needs are known well enough before it runs (dispatch/routing.py). A
request that finds them at zero asks for all of them together and waits here, where it costs one
future, rather than in the engine, where it would stop the whole batch in every layer.
`ActivationRequester` sends one activation request for a function however many requests wait for it.
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

from faasmoe_contracts.control_messages import ActivationRequest
from faasmoe_router.control.awaited_activation import AwaitedActivation
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import (
    ActivationQueueFull,
    ActivationTimeout,
    ControlError,
    EngineUnavailable,
)
from faasmoe_tracing import NO_SPAN, Span

logger = logging.getLogger(__name__)

ACTIVATION_REPEAT_S = 1.0  # a restarted control process does not know earlier requests


class PendingActivations:
    """Functions to request, in order of arrival, and when each was last requested. Pure.

    Args:
        repeat_s: least time between two requests for the same function, in seconds.
    """

    def __init__(self, repeat_s: float = ACTIVATION_REPEAT_S) -> None:
        self._repeat_s = repeat_s
        self._pending: dict[str, None] = {}
        self._requested_s: dict[str, float] = {}

    def add(self, function_ids: Iterable[str]) -> None:
        """Add functions; one that was requested recently is due when `repeat_s` is over."""
        self._pending.update(dict.fromkeys(function_ids))

    def pop_due(self, now_s: float) -> list[str]:
        """Return the functions to request now, and count them as requested."""
        due = [name for name in self._pending if self._due_s(name) <= now_s]
        for name in due:
            del self._pending[name]
            self._requested_s[name] = now_s
        return due

    def next_due_s(self) -> float:
        """Return when the next function is due; infinity if none is pending."""
        return min(map(self._due_s, self._pending), default=math.inf)

    def retain(self, missing: Collection[str]) -> None:
        """Drop the functions that are no longer missing."""
        self._pending = {name: None for name in self._pending if name in missing}
        self._requested_s = {name: s for name, s in self._requested_s.items() if name in missing}

    def reset_requested(self) -> None:
        """Forget earlier requests, because the control process that received them is gone."""
        self._requested_s.clear()

    def _due_s(self, name: str) -> float:
        requested_s = self._requested_s.get(name)
        return -math.inf if requested_s is None else requested_s + self._repeat_s


class ActivationRequester:
    """Sends activation requests to the control plane.

    Used on the event loop only, except for `request_threadsafe`.

    Args:
        client: the control plane.
        router_name: name of this router.
        metrics: metrics of the link.
        repeat_s: least time between two requests for the same function, in seconds.
    """

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
        self._traceparent = ""

    def request(self, function_ids: Iterable[str]) -> None:
        """Request functions, unless they were requested recently."""
        self._pending.add(function_ids)
        self._changed.set()

    def request_threadsafe(self, function_ids: Iterable[str]) -> None:
        """Request functions from any thread; does nothing while `run` is not running."""
        loop, ids = self._loop, list(function_ids)
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.request, ids)

    def set_traceparent(self, traceparent: str) -> None:
        """Send this span with further requests; empty for none."""
        self._traceparent = traceparent

    def retain_missing(self, missing: Collection[str]) -> None:
        """Drop pending functions other than these: they have addresses."""
        self._pending.retain(missing)

    def reset_requested(self) -> None:
        """Allow repeating requests immediately: the control process has restarted."""
        self._pending.reset_requested()

    async def run(self, missing: Callable[[], Collection[str]]) -> None:
        """Send activation requests until cancelled.

        Args:
            missing: returns the functions that have no address; others are not requested.
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
        remaining_s = self._pending.next_due_s() - time.monotonic()
        if remaining_s <= 0:
            return
        try:
            async with asyncio.timeout(None if math.isinf(remaining_s) else remaining_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _send(self, function_ids: list[str]) -> None:
        request = ActivationRequest(self._router_name, tuple(function_ids), time.time())
        self._metrics.activation_requests.inc()
        try:
            await self._client.request_activation(request, traceparent=self._traceparent)
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
    """Capacity of the activation queue.

    Attributes:
        max_requests: queued requests.
        max_bytes: total size of their bodies, in bytes.
        timeout_s: longest wait of a request, in seconds.
    """

    max_requests: int = 1024
    max_bytes: int = 64 << 20
    timeout_s: float = 30.0


class FunctionAvailability(Protocol):
    """Availability of the functions that a request needs."""

    @property
    def activated_below_tokens(self) -> float:
        """Requests of fewer tokens than this need no missing function."""

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions without address that a request of `n_tokens` tokens needs."""

    async def enable_local_fallback(self, n_tokens: int) -> bool:
        """Compute the missing functions in the router; return whether that is possible."""


class Activator:
    """Queues requests until the functions that they need are available.

    Used on the event loop only.

    Args:
        functions: availability of functions.
        request_activation: requests functions; repeated requests are harmless.
        limits: capacity of the queue.
        metrics: metrics of the link.
        load: meter in which an awaited function counts as one call in flight, however many
            requests wait for it, since they will share one call.
        awaited_activation: traces what requests wait for.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        functions: FunctionAvailability,
        *,
        request_activation: Callable[[Sequence[str]], None],
        limits: ActivationQueueLimits,
        metrics: ControlLinkMetrics,
        load: LoadMeter,
        awaited_activation: AwaitedActivation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._request_activation = request_activation
        self._limits = limits
        self._metrics = metrics
        self._load = load
        self._awaited_activation = awaited_activation or AwaitedActivation()
        self._clock = clock
        self._queued: dict[asyncio.Future[None], int] = {}  # tokens of each request
        self._queued_bytes = 0
        self._max_tokens = 0
        self._awaited: Sequence[str] = ()
        self._is_closed = False

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return whether a request of `n_tokens` tokens needs no missing function."""
        return n_tokens < self._functions.activated_below_tokens

    async def wait_for_activation(
        self, n_tokens: int, *, size_bytes: int, span: Span = NO_SPAN
    ) -> float:
        """Wait until the functions of a request have addresses or local fallback covers them.

        Args:
            n_tokens: tokens of the request's prompt.
            size_bytes: size of the request's body.
            span: the span of its wait.

        Returns:
            The time waited, in seconds; 0 if nothing was missing.

        Raises:
            ActivationTimeout: the functions were not activated in time.
            StoreCorrupted: the missing functions are corrupted in this router's store too.
            ActivationQueueFull: the queue is full.
            EngineUnavailable: the server is shutting down.
        """
        if self.is_activated_for(n_tokens):  # since the caller asked; no further change follows
            return 0.0
        self._check_capacity(size_bytes)
        started_s = self._clock()
        with self._joined(span), self._queue_slot(n_tokens, size_bytes) as waiter:
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
        self.on_table_changed()  # releases other requests that need the same functions

    def on_table_changed(self) -> None:
        """Release the requests whose functions are available now."""
        for waiter, n_tokens in self._queued.items():
            if self.is_activated_for(n_tokens) and not waiter.done():
                waiter.set_result(None)
        self._update_awaited()
        self.repeat_request()

    def repeat_request(self) -> None:
        """Request the awaited functions again."""
        if self._awaited:
            self._request_activation(self._awaited)

    @property
    def n_queued(self) -> int:
        """Requests that wait."""
        return len(self._queued)

    def close(self) -> None:
        """Reject all queued and future requests."""
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
    def _joined(self, span: Span) -> Iterator[None]:
        self._awaited_activation.join(span)
        try:
            yield
        finally:
            self._awaited_activation.leave(span)
            if not self._queued:
                self._awaited_activation.finish()

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
        """Recompute the awaited functions and their load."""
        self._max_tokens = max(self._queued.values(), default=0)
        previous, self._awaited = self._awaited, self._functions.missing_for(self._max_tokens)
        now_s = self._clock()
        for name in set(previous).difference(self._awaited):
            self._load.record_end(name, now_s)
        for name in set(self._awaited).difference(previous):
            self._load.record_queued(name, now_s)
