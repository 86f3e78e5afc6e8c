"""The sequences that an engine holds, from their request to their last token.

They wait for their turns by tenant, are computed by whatever batcher lives, and end once: finished,
cancelled, failed or overdue. What becomes of each is told to its generation and counted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from faasmoe_router.engine.batching import Batcher
from faasmoe_router.engine.generation import Delta, Generation, GenerationRequest
from faasmoe_router.engine.running import Running
from faasmoe_router.engine.scheduler import request_id_of
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import EngineUnavailable, GenerationFailed, NoTokenAllowed
from faasmoe_router.metrics import EngineMetrics
from faasmoe_router.tenants.callers import Ticket
from faasmoe_router.tenants.fairness import FairQueue

logger = logging.getLogger(__name__)


class Held:
    """Sequences that wait or run; all of it is called on the engine's event loop.

    Args:
        turns: whose turn it is.
        batcher: returns the batcher that computes now, if one does.
        codec: the model's tokenizer.
        eos_ids: the model's own end tokens.
        metrics: where their times and ends are counted.
    """

    def __init__(
        self,
        turns: FairQueue,
        batcher: Callable[[], Batcher | None],
        *,
        codec: TextCodec,
        eos_ids: tuple[int, ...],
        metrics: EngineMetrics,
    ) -> None:
        self._turns = turns
        self._batcher = batcher
        self._codec = codec
        self._eos_ids = eos_ids
        self._metrics = metrics
        self._running: dict[str, Running] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        return len(self._running)

    def add(
        self, requests: Sequence[GenerationRequest], tenant: str, ticket: Ticket | None
    ) -> Generation:
        """Have a tenant's sequences wait for their turns, and begin those whose turn it is.

        Raises:
            TenantQueueFull: too many of this tenant's sequences wait already.
        """
        self._turns.check_room(tenant, len(requests))
        ids = [request_id_of(tenant, next(self._ids)) for _ in requests]
        generation = Generation(len(requests), lambda: self._abort(ids), ticket)
        now_s = time.monotonic()
        for index, (sequence_id, request) in enumerate(zip(ids, requests, strict=True)):
            running = Running(request, generation, index=index, now_s=now_s)
            self._running[sequence_id] = running
            self._turns.push(tenant, sequence_id, n_prompt=len(request.prompt_ids))
        self.give_turns()
        return generation

    def give_turns(self) -> None:
        """Let sequences run while there are slots, and take slots from who is beyond its share."""
        batcher = self._batcher()
        if batcher is None or not batcher.alive:
            return
        while True:
            while (sequence_id := self._turns.pop()) is not None:
                self._start(sequence_id, batcher)
            parked = self._turns.park()
            if parked is None:
                return
            batcher.park(parked)

    def _start(self, sequence_id: str, batcher: Batcher) -> None:
        running = self._running[sequence_id]
        if running.is_in(batcher.life):
            batcher.resume(sequence_id)
            return
        running.generation.begin()
        # A batcher that has just died takes none: its successor is given it.
        with contextlib.suppress(EngineUnavailable):
            running.submit(sequence_id, batcher, self._codec, self._eos_ids)

    def _abort(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            if self._drop(sequence_id) is not None:
                self._metrics.finished("abort")
        self.give_turns()

    def _drop(self, sequence_id: str) -> Running | None:
        """Forget a sequence, wherever it is."""
        running = self._running.pop(sequence_id, None)
        self._turns.end(sequence_id)
        batcher = self._batcher()
        if running is not None and batcher is not None and running.is_in(batcher.life):
            batcher.cancel(sequence_id)
        return running

    def take_outputs(self, outputs: Sequence[Any], cached: Mapping[str, int]) -> None:
        """Take a batch's outputs; runs on the event loop."""
        now_s = time.monotonic()
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue  # cancelled while the batch ran
            if output.error is not None:
                logger.error("A request failed in the engine: %s", output.error)
                self._fail(output.request_id)
                continue
            try:
                n_cached = cached.get(output.request_id, 0)
                self._advance(output, running, n_cached=n_cached, now_s=now_s)
            except Exception:  # one request's text must not stop the others'
                logger.exception("A request's tokens could not be turned into text")
                self._fail(output.request_id)
        self.give_turns()

    def take_broken(self, sequence_ids: Sequence[str], error: GenerationFailed) -> None:
        """End requests that cannot go on, ahead of the tokens that were made of their scores."""
        for sequence_id in sequence_ids:
            if sequence_id in self._running:
                if not isinstance(error, NoTokenAllowed):  # which is the client's own doing
                    logger.error("A request ends with an error: %s", error)
                self._fail(sequence_id, error)

    def _advance(self, output: Any, running: Running, *, n_cached: int, now_s: float) -> None:
        is_first = not running.tokens
        delta = running.take(output)
        if delta is None:
            return
        self._measure(running, n_cached=n_cached, now_s=now_s, is_first=is_first)
        if is_first:
            delta = replace(delta, n_cached_tokens=n_cached)
        self._metrics.generation_tokens.inc(delta.n_tokens)
        self._turns.charge(output.request_id, delta.n_tokens)
        if delta.finish_reason is not None:
            self._finish(output, running, delta, now_s=now_s)
        running.generation.put(running.index, delta)

    def _finish(self, output: Any, running: Running, delta: Delta, *, now_s: float) -> None:
        if output.is_finished():
            del self._running[output.request_id]
            self._turns.end(output.request_id)
        else:  # a stop string, which only we know of
            self._drop(output.request_id)
        self._metrics.e2e_latency_s.observe(now_s - running.arrived_s)
        self._metrics.finished(str(delta.finish_reason))

    def _measure(self, running: Running, *, n_cached: int, now_s: float, is_first: bool) -> None:
        if is_first:
            n_prompt = len(running.request.prompt_ids)
            self._metrics.prompt_tokens.inc(n_prompt)
            self._metrics.prefix_queries.inc(n_prompt)
            self._metrics.prefix_hits.inc(n_cached)
            self._metrics.time_to_first_token_s.observe(now_s - running.arrived_s)
        else:
            self._metrics.inter_token_latency_s.observe(now_s - running.last_s)
        running.last_s = now_s

    def _fail(self, sequence_id: str, error: GenerationFailed | None = None) -> None:
        running = self._drop(sequence_id)
        if running is not None:
            error = error or GenerationFailed("the model could not finish this request")
            running.generation.fail(error)
            self._metrics.finished("error")

    def fail_all(self, why: str) -> None:
        """End every request by an error."""
        self._fail_these(list(self._running), why)

    def note_death(self, life: object) -> None:
        """Count a batcher's death for those that it computed; end those that it may be due to."""
        for sequence_id, running in self._running.items():
            if running.is_in(life) and self._turns.is_running(sequence_id):
                running.count_death()
        suspects = [i for i, running in self._running.items() if running.is_suspect]
        self._fail_these(suspects, "the engine died again while it computed this request")

    def take_over(self, batcher: Batcher) -> None:
        """Give a new batcher those that have a slot; who gave way or waits comes by its turn."""
        taken = [i for i in self._running if self._turns.is_running(i)]
        for sequence_id in taken:
            self._start(sequence_id, batcher)
        self._metrics.resumed.inc(sum(bool(self._running[i].tokens) for i in taken))

    def _fail_these(self, sequence_ids: Sequence[str], why: str) -> None:
        if sequence_ids:
            logger.error("%d requests end with an error: %s", len(sequence_ids), why)
        for sequence_id in sequence_ids:
            self._fail(sequence_id, GenerationFailed(why))

    def end_overdue(self, now_s: float, *, timeout_s: float) -> None:
        """End the requests that have taken longer than any may."""
        overdue = [i for i, r in self._running.items() if now_s - r.arrived_s > timeout_s]
        for sequence_id in overdue:
            why = f"the request was not finished within {timeout_s:g} s"
            self._fail(sequence_id, GenerationFailed(why))
