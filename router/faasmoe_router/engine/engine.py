"""The engine: takes requests on the event loop, runs them in batches, and stays up.

After a fatal error (the batch's thread died) the engine is not ready, and a new batcher is made
over the same model: that takes a cache allocation, where a new process would load the model and
connect to every sandbox again. Requests go on from the tokens that they have; one that ran when a
batcher died and runs when the next one dies may be why, and gets an error. A fault that comes back
uses up the restarts; then the engine gives up and says so, and the process had better end and be
replaced.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from faasmoe_router.engine.batching import Batcher, eos_ids_of
from faasmoe_router.engine.generation import Delta, Generation, GenerationRequest
from faasmoe_router.engine.grammar import GrammarCompiler
from faasmoe_router.engine.isolation import FINAL
from faasmoe_router.engine.keeper import BatcherKeeper
from faasmoe_router.engine.prefixes import PrefixRealms
from faasmoe_router.engine.running import Running
from faasmoe_router.engine.scheduler import ComputedTokens, request_id_of
from faasmoe_router.engine.sizing import EngineLimits
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import (
    EngineSaturated,
    EngineUnavailable,
    GenerationFailed,
    NoTokenAllowed,
)
from faasmoe_router.metrics import EngineMetrics
from faasmoe_router.tenants.callers import Ticket
from faasmoe_router.tenants.fairness import FairQueue, Share

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class Engine:
    """Generates text for many requests at once; use it as an async context manager.

    Everything but the batches themselves runs on the event loop that entered it. Sequences wait
    here for their turn, by tenant: the batcher is given only what it can compute at once.

    Attributes:
        limits: what the engine may hold.
        codec: the model's tokenizer.
        vocabulary: the model's tokens as bytes.
        grammars: compiles what texts are held to.
        computed: tokens that were computed for each tenant.
    """

    def __init__(
        self,
        model: Any,
        codec: TextCodec,
        *,
        limits: EngineLimits,
        metrics: EngineMetrics,
        on_give_up: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
        request_timeout_s: float = math.inf,
    ) -> None:
        self.limits = limits
        self.codec = codec
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._model = model
        self._metrics = metrics
        self._on_idle = on_idle
        self._request_timeout_s = request_timeout_s
        self._eos_ids = eos_ids_of(model)
        self.vocabulary = codec.vocabulary(n_tokens=self.vocab_size, eos_ids=self._eos_ids)
        self.grammars = GrammarCompiler(self.vocabulary)
        self._keeper = BatcherKeeper(lambda loop: self._make_batcher(loop), on_give_up=on_give_up)
        self._running: dict[str, Running] = {}
        self._turns = FairQueue(slots=limits.max_num_seqs, max_queued=limits.max_waiting)
        self._realms: PrefixRealms | None = None
        self.computed = ComputedTokens()
        self._ids = itertools.count()
        self._watcher: asyncio.Task[None] | None = None
        metrics.watch(self._counts)

    @property
    def ready(self) -> bool:
        """Whether requests can be computed now."""
        return self._batcher is not None and self._batcher.alive

    @property
    def stuck(self) -> bool:
        """Whether a thread was left behind because it did not end in time."""
        return self._keeper.stuck

    @property
    def busy(self) -> bool:
        """Whether any request is being computed or waits to be."""
        return bool(self._running)

    async def __aenter__(self) -> Self:
        await self._keeper.start()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._keeper.stop()
        self._fail_all("the engine was stopped")

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Serve tenants, by their shares, from the next turn on.

        Args:
            shares: what each is entitled to.
            prefix_groups: each one's group; the prompts of a group share the cache of their
                beginnings, from the engine's next start on if it has served none yet.
        """
        self._turns.set_shares(shares)
        if self._realms is None:
            self._realms = PrefixRealms(self.vocab_size)
        self._realms.set_groups(prefix_groups)

    def sequences_of(self, tenant: str) -> tuple[int, int]:
        """Return how many sequences of a tenant run, and how many wait."""
        return self._turns.counts(tenant)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        tenant: str = "",
        ticket: Ticket | None = None,
    ) -> Generation:
        """Begin to generate; the generation's indices are the requests' places.

        Args:
            requests: the sequences, which wait for their turns each by itself.
            tenant: whose turns these are.
            ticket: hears what becomes of them.

        Raises:
            EngineUnavailable: the engine does not run.
            EngineSaturated: too many requests wait already.
            TenantQueueFull: too many of this tenant's do.
        """
        if self._batcher is None or not self._batcher.alive:
            raise EngineUnavailable("the engine is starting")
        capacity = self.limits.capacity
        if len(self._running) + len(requests) > capacity:
            raise EngineSaturated(
                f"{len(self._running)} requests are held, at most {capacity} may be"
            )
        self._turns.check_room(tenant, len(requests))
        ids = [request_id_of(tenant, next(self._ids)) for _ in requests]
        generation = Generation(len(requests), lambda: self._abort(ids), ticket)
        now_s = time.monotonic()
        for index, (sequence_id, request) in enumerate(zip(ids, requests, strict=True)):
            running = Running(request, generation, index=index, now_s=now_s)
            self._running[sequence_id] = running
            self._turns.push(tenant, sequence_id, n_prompt=len(request.prompt_ids))
        self._give_turns()
        return generation

    def end_running(self) -> None:
        """End every request by an error, as when the server is about to end."""
        self._fail_all("the server ends")

    @property
    def _batcher(self) -> Batcher | None:
        return self._keeper.batcher

    def _give_turns(self) -> None:
        """Let sequences run while there are slots, and take slots from who is beyond its share."""
        batcher = self._batcher
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
            running.submit(sequence_id, batcher, self.codec, self._eos_ids)

    def _abort(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            if self._drop(sequence_id) is not None:
                self._metrics.finished("abort")
        self._give_turns()

    def _drop(self, sequence_id: str) -> Running | None:
        """Forget a sequence, wherever it is."""
        running = self._running.pop(sequence_id, None)
        self._turns.end(sequence_id)
        batcher = self._batcher
        if running is not None and batcher is not None and running.is_in(batcher.life):
            batcher.cancel(sequence_id)
        return running

    def _on_outputs(self, outputs: Sequence[Any], cached: Mapping[str, int]) -> None:
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
        self._give_turns()

    def _on_broken(self, sequence_ids: Sequence[str], error: GenerationFailed) -> None:
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

    def _fail_all(self, why: str) -> None:
        self._fail_these(list(self._running), why)

    def _note_death(self, life: object) -> None:
        """Count a batcher's death for those that it computed; end those that it may be due to."""
        for sequence_id, running in self._running.items():
            if running.is_in(life) and self._turns.is_running(sequence_id):
                running.count_death()
        suspects = [i for i, running in self._running.items() if running.is_suspect]
        self._fail_these(suspects, "the engine died again while it computed this request")

    def _take_over(self, batcher: Batcher) -> None:
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

    def _end_overdue(self, now_s: float) -> None:
        """End the requests that have taken longer than any may."""
        timeout_s = self._request_timeout_s
        overdue = [i for i, r in self._running.items() if now_s - r.arrived_s > timeout_s]
        for sequence_id in overdue:
            why = f"the request was not finished within {timeout_s:g} s"
            self._fail(sequence_id, GenerationFailed(why))

    def _counts(self) -> tuple[int, int]:
        if self._batcher is None:
            return 0, self._turns.n_waiting
        running, waiting = self._batcher.counts()
        return running, waiting + self._turns.n_waiting

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._end_overdue(time.monotonic())
            if self._batcher is None or self._batcher.alive:
                continue
            if not await self._replace():
                self._fail_all("the engine gave up")
                return

    async def _replace(self) -> bool:
        """Put another batcher in the place of one that has died; return whether that was done."""
        assert self._batcher is not None
        life, error = self._batcher.life, self._batcher.fatal_error
        why_final = str(error) if isinstance(error, FINAL) else ""
        logger.error("The engine died: %s", repr(error))
        del error  # and with it the frames that it was raised in, which hold the cache
        await self._keeper.stop()
        self._note_death(life)
        if not await self._keeper.restart(why_final):
            return False
        assert self._batcher is not None
        self._take_over(self._batcher)
        self._give_turns()
        return True

    def _make_batcher(self, loop: asyncio.AbstractEventLoop) -> Batcher:
        gc.collect()  # one that has died is a knot of references, its cache among them
        batcher = Batcher(
            self._model,
            self.limits,
            realms=self._realms,
            computed=self.computed,
            on_idle=self._on_idle,
        )
        batcher.start(loop, self._on_outputs, self._on_broken)
        return batcher
