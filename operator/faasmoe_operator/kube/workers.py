"""Works through the queue: some models at a time, each when it is due."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from faasmoe_operator.kube.errors import ApiError, Unavailable
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.queue import WorkQueue
from faasmoe_operator.kube.reconciler import Visit

logger = logging.getLogger(__name__)


class Reconcile(Protocol):
    """Visits a model."""

    def __call__(self, key: ModelKey) -> Awaitable[Visit]:
        """Visit a model."""
        ...


class Workers:
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
        self._news = asyncio.Event()

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Have a model visited; see WorkQueue.add."""
        self._queue.add(key, now=self._clock(), delay_s=delay_s, urgent=urgent)
        self._news.set()

    async def run(self, reconcile: Reconcile) -> None:
        """Work until cancelled.

        Args:
            reconcile: visits a model; whatever it raises is logged, and tried again later.
        """
        async with asyncio.TaskGroup() as group:
            for _ in range(self._n_workers):
                group.create_task(self._work(reconcile))

    async def _work(self, reconcile: Reconcile) -> None:
        while True:
            taken = self._queue.take(self._clock())
            self._metrics.queue_depth.set(len(self._queue))
            if taken is None:
                await self._wait()
                continue
            key, late_s = taken
            self._metrics.queue_latency.observe(late_s)
            await self._visit(reconcile, key)
            self._news.set()

    async def _wait(self) -> None:
        """Wait until something is due or said; each worker looks again then."""
        self._news.clear()
        try:
            async with asyncio.timeout(self._queue.wait_s(self._clock())):
                await self._news.wait()
        except TimeoutError:
            return

    async def _visit(self, reconcile: Reconcile, key: ModelKey) -> None:
        began = self._clock()
        outcome, again_s, at_least_s = "error", None, 0.0
        try:
            visit = await reconcile(key)
            outcome = "troubled" if visit.is_troubled else "settled"
            again_s = visit.again_s
        except Unavailable as error:
            logger.warning("%s: %s", key, error)
            outcome, at_least_s = "unavailable", error.retry_after_s or 0.0
        except ApiError as error:
            logger.warning("%s: %s", key, error)
            outcome = "refused"
        except Exception:
            logger.exception("%s: a visit failed", key)
        now = self._clock()
        self._metrics.reconciles.labels(outcome).inc()
        self._metrics.reconcile_time.observe(now - began)
        if outcome == "settled":
            self._queue.done(key, now=now, again_s=again_s)
        else:
            self._queue.failed(key, now=now, at_least_s=at_least_s)
