"""Dynamic batching of frames from several routers for the same function.

The cost of a frame is mostly reading the weights of its experts, which a batch reads once. The
batcher never waits for frames: those that arrive while a batch is computed form the next one. A
frame of many rows is bound by its own products and computed alone, so that a prefill does not delay
decode steps that arrived before it.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from faasmoe_contracts.wire import Buffer
from faasmoe_expert.server.runtime import ComputeTask

MAX_BATCH_ROWS = 64
"""Maximum rows of a batch: products of up to this many rows are nearly bound by reading weights
(docs/performance-log.md)."""

SENDER_TTL_S = 1.0
"""How long a router counts as active after its last frame."""

T = TypeVar("T")
ComputeBatch = Callable[[Sequence[ComputeTask]], list[list[Buffer]]]


class SenderTracker:
    """Tracks whether frames arrive from more than one router."""

    def __init__(self) -> None:
        self._last_sender: Hashable = None
        self._last_seen_s = self._other_seen_s = float("-inf")

    def record_is_concurrent(self, sender: Hashable, now_s: float) -> bool:
        """Record a frame; return whether another router sent one within SENDER_TTL_S.

        Args:
            sender: identity of the frame's router.
            now_s: arrival time on a monotonic clock.
        """
        if sender != self._last_sender:
            self._last_sender, self._other_seen_s = sender, self._last_seen_s
        self._last_seen_s = now_s
        return now_s - self._other_seen_s < SENDER_TTL_S


class DynamicBatcher:
    """Queues frames and computes them in batches. Belongs to one event loop.

    Args:
        compute_batch: returns the response frames of tasks with the same batch key. If it raises
            for a batch, each task is computed alone and fails with its own exception.
    """

    def __init__(self, compute_batch: ComputeBatch) -> None:
        self._compute_batch = compute_batch
        self._queue: deque[tuple[ComputeTask, Future[list[Buffer]]]] = deque()

    def submit(self, task: ComputeTask) -> Future[list[Buffer]]:
        """Queue one frame; return a future of its response frame."""
        loop = asyncio.get_running_loop()
        future: Future[list[Buffer]] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._run_batch)
        self._queue.append((task, future))
        return future

    def _run_batch(self) -> None:
        """Compute the next batch; the event loop reads new frames before the one after it."""
        batch = pop_batch(self._queue)
        if self._queue:
            asyncio.get_running_loop().call_soon(self._run_batch)
        try:
            responses = self._compute_batch([task for task, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                _set_exception(batch[0][1], error)
            else:  # one task may have failed the others
                self._compute_individually(batch)
            return
        for (_, future), response in zip(batch, responses, strict=True):
            if not future.done():
                future.set_result(response)

    def _compute_individually(
        self, batch: Sequence[tuple[ComputeTask, Future[list[Buffer]]]]
    ) -> None:
        for task, future in batch:
            try:
                responses = self._compute_batch([task])
            except Exception as error:
                _set_exception(future, error)
                continue
            if not future.done():
                future.set_result(responses[0])


def pop_batch(queue: deque[tuple[ComputeTask, T]]) -> list[tuple[ComputeTask, T]]:
    """Remove and return the first task and those that can be batched with it, in order.

    The remaining tasks keep their order.
    """
    first = queue.popleft()
    batch, n_rows = [first], first[0].request.header.n_rows
    for _ in range(len(queue)):
        item = queue.popleft()
        rows = item[0].request.header.n_rows
        if item[0].batch_key == first[0].batch_key and n_rows + rows <= MAX_BATCH_ROWS:
            batch.append(item)
            n_rows += rows
        else:
            queue.append(item)
    return batch


def _set_exception(future: Future[list[Buffer]], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
