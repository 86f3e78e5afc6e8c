"""Work queue of models with delays and per-key back-off, and the workers that drain it.

A failing key waits for its back-off even if events add it meanwhile, since the failing reconcile
itself causes events; only an urgent add (its spec has changed) ends the wait. A key is never
processed by two workers at once. WorkQueue is pure: callers pass the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from faasmoe_contracts.backoff import ExponentialBackoff
from faasmoe_operator.kube.errors import KubeApiError, Unavailable
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.reconciler import ReconcileResult
from faasmoe_operator.kube.types import ModelKey

logger = logging.getLogger(__name__)


Key = TypeVar("Key", bound=Hashable)

BASE_BACKOFF_S = 1.0
MAX_BACKOFF_S = 300.0


@dataclass(frozen=True, slots=True)
class _QueuedKey:
    """State of a key.

    Attributes:
        due: when it is due; None if it is not enqueued.
        busy: whether a worker processes it.
        backoff: back-off after consecutive failures.
        not_before: end of its back-off.
        urgent: whether it was added as urgent since its processing began.
    """

    due: float | None = None
    busy: bool = False
    backoff: ExponentialBackoff = field(
        default_factory=lambda: ExponentialBackoff(BASE_BACKOFF_S, MAX_BACKOFF_S)
    )
    not_before: float = 0.0
    urgent: bool = False


class WorkQueue(Generic[Key]):
    """Keys to process, each with the time when it is due. All times are in seconds."""

    def __init__(self) -> None:
        self._entries: dict[Key, _QueuedKey] = {}

    def __len__(self) -> int:
        """Return the number of keys that are enqueued or being processed."""
        return sum(entry.busy or entry.due is not None for entry in self._entries.values())

    def add(self, key: Key, *, now: float, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Enqueue a key; if it is already enqueued, the earlier time counts.

        Args:
            key: the key.
            now: the current time.
            delay_s: delay until it is due.
            urgent: reset its failures and end its back-off.
        """
        entry = self._entries.get(key, _QueuedKey())
        if urgent:
            entry.backoff.reset()
            entry = replace(entry, not_before=0.0, due=None, urgent=True)
        due = max(now + delay_s, entry.not_before)
        earliest = due if entry.due is None else min(due, entry.due)
        self._entries[key] = replace(entry, due=earliest)

    def get(self, now: float) -> tuple[Key, float] | None:
        """Take a due key; return it and how long it was due. It is busy until `done`."""
        due_keys = [
            (entry.due, key)
            for key, entry in self._entries.items()
            if not entry.busy and entry.due is not None and entry.due <= now
        ]
        if not due_keys:
            return None
        due, key = min(due_keys, key=lambda pair: pair[0])
        self._entries[key] = replace(self._entries[key], due=None, busy=True, urgent=False)
        return key, now - due

    def done(self, key: Key, *, now: float, requeue_after_s: float | None = None) -> None:
        """Mark a key as processed successfully.

        Args:
            key: the key.
            now: the current time.
            requeue_after_s: enqueue it again with this delay; None for not at all.
        """
        entry = self._entries[key]
        entry.backoff.reset()
        self._entries[key] = replace(entry, busy=False, not_before=0.0)
        if requeue_after_s is not None:
            self.add(key, now=now, delay_s=requeue_after_s)
        elif entry.due is None:
            del self._entries[key]

    def requeue_with_backoff(self, key: Key, *, now: float, min_delay_s: float = 0.0) -> float:
        """Mark a key as failed and enqueue it with back-off; return the delay."""
        entry = replace(self._entries[key], busy=False)
        if entry.urgent:
            self._entries[key] = entry
            return 0.0
        until = now + max(min_delay_s, entry.backoff.next_delay_s())
        self._entries[key] = replace(entry, due=until, not_before=until)
        return until - now

    def next_due_in_s(self, now: float) -> float | None:
        """Return the time until the next key is due; None if none is enqueued."""
        times = [
            entry.due
            for entry in self._entries.values()
            if not entry.busy and entry.due is not None
        ]
        return max(0.0, min(times) - now) if times else None


class ReconcileFunc(Protocol):
    """Reconciles a model."""

    def __call__(self, key: ModelKey) -> Awaitable[ReconcileResult]:
        """Reconcile a model."""
        ...


class WorkerPool:
    """Workers that reconcile models when they are due.

    Args:
        metrics: queue and reconcile metrics are recorded here.
        n_workers: number of concurrent reconciles.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        *,
        metrics: OperatorMetrics,
        n_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._clock = metrics, clock
        self._n_workers = n_workers
        self._queue: WorkQueue[ModelKey] = WorkQueue()
        self._wakeup = asyncio.Event()

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Enqueue a model; see WorkQueue.add."""
        self._queue.add(key, now=self._clock(), delay_s=delay_s, urgent=urgent)
        self._wakeup.set()

    async def run(self, reconcile: ReconcileFunc) -> None:
        """Run the workers until cancelled.

        Args:
            reconcile: reconciles a model; exceptions are logged and the model is retried.
        """
        async with asyncio.TaskGroup() as group:
            for _ in range(self._n_workers):
                group.create_task(self._run_worker(reconcile))

    async def _run_worker(self, reconcile: ReconcileFunc) -> None:
        while True:
            item = self._queue.get(self._clock())
            self._metrics.queue_depth.set(len(self._queue))
            if item is None:
                await self._wait_until_due()
                continue
            key, queued_s = item
            self._metrics.queue_duration.observe(queued_s)
            await self._reconcile(reconcile, key)
            self._wakeup.set()

    async def _wait_until_due(self) -> None:
        """Wait until a key is due or the queue changes."""
        self._wakeup.clear()
        try:
            async with asyncio.timeout(self._queue.next_due_in_s(self._clock())):
                await self._wakeup.wait()
        except TimeoutError:
            return

    async def _reconcile(self, reconcile: ReconcileFunc, key: ModelKey) -> None:
        started_at = self._clock()
        outcome, requeue_after_s, min_delay_s = "error", None, 0.0
        try:
            result = await reconcile(key)
            outcome = "requeue" if result.has_failures else "success"
            requeue_after_s = result.requeue_after_s
        except Unavailable as error:
            logger.warning("%s: %s", key, error)
            outcome, min_delay_s = "unavailable", error.retry_after_s or 0.0
        except KubeApiError as error:
            logger.warning("%s: %s", key, error)
            outcome = "rejected"
        except Exception:
            logger.exception("%s: reconcile failed", key)
        now = self._clock()
        self._metrics.reconciles.labels(outcome).inc()
        self._metrics.reconcile_duration.observe(now - started_at)
        if outcome == "success":
            self._queue.done(key, now=now, requeue_after_s=requeue_after_s)
        else:
            self._queue.requeue_with_backoff(key, now=now, min_delay_s=min_delay_s)
