"""Frames of several routers that wait for the same function are computed as one.

What a frame costs is mostly reading the weights of its experts, which frames that are
computed together read once. Nothing is waited for: while one batch is computed the next frames
come in, and those that are there when it is done are taken together. A frame of many rows, bound
by its own products, is computed alone, so that a prompt holds up no decode that came before it.
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
"""Rows of a batch: products of up to so many rows are bound by reading weights, or nearly so
(docs/performance.md)."""

SENDER_TTL_S = 1.0
"""How long a router counts as one that sends frames after its last one."""

T = TypeVar("T")
ComputeBatch = Callable[[Sequence[ComputeTask]], list[list[Buffer]]]


class SenderTracker:
    """Whether frames come from more than one router. Pure: who and when are told."""

    def __init__(self) -> None:
        self._last_sender: Hashable = None
        self._last_seen_s = self._other_seen_s = float("-inf")

    def record_is_concurrent(self, sender: Hashable, now_s: float) -> bool:
        """Take note of a frame; tell whether another router has sent one lately.

        Args:
            sender: whose frame it is.
            now_s: on a clock that does not go back.
        """
        if sender != self._last_sender:
            self._last_sender, self._other_seen_s = sender, self._last_seen_s
        self._last_seen_s = now_s
        return now_s - self._other_seen_s < SENDER_TTL_S


class DynamicBatcher:
    """Frames that wait, and who waits for them; belongs to one event loop.

    Args:
        compute: returns the answers of work that is alike; whatever it raises is its senders'.
    """

    def __init__(self, compute_batch: ComputeBatch) -> None:
        self._compute_batch = compute_batch
        self._queue: deque[tuple[ComputeTask, Future[list[Buffer]]]] = deque()

    def submit(self, task: ComputeTask) -> Future[list[Buffer]]:
        """Return the answer to come of one frame."""
        loop = asyncio.get_running_loop()
        future: Future[list[Buffer]] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._run_batch)
        self._queue.append((task, future))
        return future

    def _run_batch(self) -> None:
        """Compute the first batch; the loop reads what has come meanwhile before the next."""
        batch = pop_batch(self._queue)
        if self._queue:
            asyncio.get_running_loop().call_soon(self._run_batch)
        try:
            responses = self._compute_batch([work for work, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                _set_exception(batch[0][1], error)
            else:  # one of them may be what the others suffer from
                self._compute_individually(batch)
            return
        for (_, coming), answer in zip(batch, responses, strict=True):
            if not coming.done():
                coming.set_result(answer)

    def _compute_individually(
        self, batch: Sequence[tuple[ComputeTask, Future[list[Buffer]]]]
    ) -> None:
        for work, coming in batch:
            try:
                responses = self._compute_batch([work])
            except Exception as error:
                _set_exception(coming, error)
                continue
            if not coming.done():
                coming.set_result(responses[0])


def pop_batch(queue: deque[tuple[ComputeTask, T]]) -> list[tuple[ComputeTask, T]]:
    """Take the first of what waits, and what can be computed with it, in order; leave the rest.

    Frames that are left keep their order, too.
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
