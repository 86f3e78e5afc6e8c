"""Which keys are to be worked on, and when; failing ones ever less often. Pure.

A key that fails waits for its back-off whatever is said of it meanwhile, since the very failing
causes events; only `urgent` news (its spec has changed) ends the wait.

Works through the queue: some models at a time, each when it is due.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from faasmoe_operator.kube.errors import KubeApiError, Unavailable
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.reconciler import ReconcileResult
from faasmoe_operator.kube.types import ModelKey

logger = logging.getLogger(__name__)


Key = TypeVar("Key", bound=Hashable)

BASE_BACKOFF_S = 1.0
MAX_BACKOFF_S = 300.0
BACKOFF_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class _QueuedKey:
    """What is known of a key.

    Attributes:
        due: when it is to be worked on; None if it is not.
        busy: whether it is being worked on.
        n_failures: failures in a row.
        not_before: end of its back-off.
        urgent: it was asked for urgently since work on it began.
    """

    due: float | None = None
    busy: bool = False
    n_failures: int = 0
    not_before: float = 0.0
    urgent: bool = False


class WorkQueue(Generic[Key]):
    """Keys to work on, each with the time when it is due."""

    def __init__(self) -> None:
        self._entries: dict[Key, _QueuedKey] = {}

    def __len__(self) -> int:
        """Return how many keys wait or are worked on."""
        return sum(entry.busy or entry.due is not None for entry in self._entries.values())

    def add(self, key: Key, *, now: float, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Ask for work on a key; of two times the earlier counts.

        Args:
            key: what to work on.
            now: the time.
            delay_s: not before this has passed.
            urgent: forget its failures.
        """
        entry = self._entries.get(key, _QueuedKey())
        if urgent:
            entry = replace(entry, n_failures=0, not_before=0.0, due=None, urgent=True)
        due = max(now + delay_s, entry.not_before)
        earliest = due if entry.due is None else min(due, entry.due)
        self._entries[key] = replace(entry, due=earliest)

    def get(self, now: float) -> tuple[Key, float] | None:
        """Return a key that is due, and how long it has been; it is busy until `done`."""
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
        """Say that work on a key went well.

        Args:
            key: the key.
            now: the time.
            again_s: work on it again after this, even if nothing happens.
        """
        entry = self._entries[key]
        self._entries[key] = replace(entry, busy=False, n_failures=0, not_before=0.0)
        if requeue_after_s is not None:
            self.add(key, now=now, delay_s=requeue_after_s)
        elif entry.due is None:
            del self._entries[key]

    def requeue_with_backoff(self, key: Key, *, now: float, min_delay_s: float = 0.0) -> float:
        """Say that work on a key failed; return after what time it is tried again."""
        entry = replace(self._entries[key], busy=False)
        if entry.urgent:
            self._entries[key] = entry
            return 0.0
        backoff_s = min(BASE_BACKOFF_S * BACKOFF_FACTOR ** min(entry.n_failures, 30), MAX_BACKOFF_S)
        until = now + max(min_delay_s, backoff_s)
        self._entries[key] = replace(
            entry, due=until, not_before=until, n_failures=entry.n_failures + 1
        )
        return until - now

    def next_due_in_s(self, now: float) -> float | None:
        """Return how long until a key is due; None if none is to be worked on."""
        times = [
            entry.due
            for entry in self._entries.values()
            if not entry.busy and entry.due is not None
        ]
        return max(0.0, min(times) - now) if times else None


class ReconcileFunc(Protocol):
    """Visits a model."""

    def __call__(self, key: ModelKey) -> Awaitable[ReconcileResult]:
        """Visit a model."""
        ...


class WorkerPool:
    """Visits models when they are due, until cancelled.

    Args:
        metrics: what is measured.
        n_workers: visits at the same time.
        clock: a clock that only goes forward.
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
        """Have a model visited; see WorkQueue.add."""
        self._queue.add(key, now=self._clock(), delay_s=delay_s, urgent=urgent)
        self._wakeup.set()

    async def run(self, reconcile: ReconcileFunc) -> None:
        """Work until cancelled.

        Args:
            reconcile: visits a model; whatever it raises is logged, and tried again later.
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
        """Wait until something is due or said; each worker looks again then."""
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
