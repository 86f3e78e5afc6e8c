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

from faasmoe_expert.server.sandbox import Work
from faasmoe_expert.wire.checksum import Buffer

MAX_BATCH_ROWS = 64
"""Rows of a batch: products of up to so many rows are bound by reading weights, or nearly so
(docs/performance.md)."""

SENDER_LASTS_S = 1.0
"""How long a router counts as one that sends frames after its last one."""

T = TypeVar("T")
Compute = Callable[[Sequence[Work]], list[list[Buffer]]]


class Senders:
    """Whether frames come from more than one router. Pure: who and when are told."""

    def __init__(self) -> None:
        self._last: Hashable = None
        self._last_s = self._other_s = float("-inf")

    def are_several(self, sender: Hashable, now_s: float) -> bool:
        """Take note of a frame; tell whether another router has sent one lately.

        Args:
            sender: whose frame it is.
            now_s: on a clock that does not go back.
        """
        if sender != self._last:
            self._last, self._other_s = sender, self._last_s
        self._last_s = now_s
        return now_s - self._other_s < SENDER_LASTS_S


class Gathering:
    """Frames that wait, and who waits for them; belongs to one event loop.

    Args:
        compute: returns the answers of work that is alike; whatever it raises is its senders'.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._waiting: deque[tuple[Work, Future[list[Buffer]]]] = deque()

    def add(self, work: Work) -> Future[list[Buffer]]:
        """Return the answer to come of one frame."""
        loop = asyncio.get_running_loop()
        coming: Future[list[Buffer]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._take_turn)
        self._waiting.append((work, coming))
        return coming

    def _take_turn(self) -> None:
        """Compute the first batch; the loop reads what has come meanwhile before the next."""
        batch = take_batch(self._waiting)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._take_turn)
        try:
            answers = self._compute([work for work, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                _fail(batch[0][1], error)
            else:  # one of them may be what the others suffer from
                self._compute_alone(batch)
            return
        for (_, coming), answer in zip(batch, answers, strict=True):
            if not coming.done():
                coming.set_result(answer)

    def _compute_alone(self, batch: Sequence[tuple[Work, Future[list[Buffer]]]]) -> None:
        for work, coming in batch:
            try:
                answers = self._compute([work])
            except Exception as error:
                _fail(coming, error)
                continue
            if not coming.done():
                coming.set_result(answers[0])


def take_batch(waiting: deque[tuple[Work, T]]) -> list[tuple[Work, T]]:
    """Take the first of what waits, and what can be computed with it, in order; leave the rest.

    Frames that are left keep their order, too.
    """
    first = waiting.popleft()
    batch, n_rows = [first], first[0].request.header.n_rows
    for _ in range(len(waiting)):
        item = waiting.popleft()
        rows = item[0].request.header.n_rows
        if item[0].likeness == first[0].likeness and n_rows + rows <= MAX_BATCH_ROWS:
            batch.append(item)
            n_rows += rows
        else:
            waiting.append(item)
    return batch


def _fail(coming: Future[list[Buffer]], error: Exception) -> None:
    if not coming.done():
        coming.set_exception(error)
