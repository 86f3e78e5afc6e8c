"""The engine: accepts requests on the event loop, runs them in batches and recovers from crashes.

After a fatal error, which ends the batcher's thread, the engine is not ready until a new batcher
runs over the same model. That costs a cache allocation, whereas a new process would load the model
and connect to every sandbox again. Requests continue from the tokens they have. One that ran during
two crashes may be their cause and fails. A recurring fault uses up the restart budget; then the
engine gives up and reports so, and the process should end and be replaced.
"""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from faasmoe_router.engine.batcher import (
    FATAL_ERRORS,
    TOKENS_PER_PAGE,
    CacheSalts,
    ComputedTokenCounter,
    EngineLimits,
    KVCacheGeometry,
    start_batcher,
)
from faasmoe_router.engine.fair_queue import FairQueue, Share
from faasmoe_router.engine.generation import Generation, GenerationRequest, UsageRecorder
from faasmoe_router.engine.journal import JournalEntry
from faasmoe_router.engine.request_tracker import RequestTracker
from faasmoe_router.engine.structured_output import GrammarCompiler
from faasmoe_router.engine.supervisor import BatcherSupervisor
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import EngineQueueFull, EngineUnavailable, QueueFull
from faasmoe_router.metrics import EngineMetrics
from faasmoe_tracing import NO_SPAN, Span
from faasmoe_transformers.continuous_batching import ContinuousBatcher, eos_token_ids
from faasmoe_transformers.native_step import ComputeMode

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class Engine:
    """Generates text for many requests at once; use it as an async context manager.

    Everything but the batches runs on the event loop that entered it. Sequences wait in a fair
    queue by tenant; the batcher is given only what it can compute at once.

    Args:
        model: the router's model.
        tokenizer: its tokenizer.
        limits: the engine's limits.
        metrics: the engine's metrics.
        on_give_up: called when the engine will not recover.
        on_idle: releases what others keep for requests once none has been present for a while.
        request_timeout_s: seconds after which a request fails.
        compute: what computes the model on a CPU in float32.

    Attributes:
        limits: the engine's limits.
        tokenizer: the model's tokenizer.
        metrics: the engine's metrics.
        vocab_size: number of scores per token.
        vocabulary: the model's tokens as bytes.
        grammar_compiler: compiles grammars that constrain texts.
        computed_tokens: tokens computed per tenant.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: ModelTokenizer,
        *,
        limits: EngineLimits,
        metrics: EngineMetrics,
        on_give_up: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
        request_timeout_s: float = math.inf,
        compute: ComputeMode = "auto",
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._model = model
        self._on_idle = on_idle
        self._request_timeout_s = request_timeout_s
        self._compute = compute
        eos_ids = eos_token_ids(model)
        self.vocabulary = tokenizer.new_vocabulary(n_scores=self.vocab_size, eos_token_ids=eos_ids)
        self.grammar_compiler = GrammarCompiler(self.vocabulary)
        self._supervisor = BatcherSupervisor(
            lambda loop: self._make_batcher(loop), on_give_up=on_give_up
        )
        self._fair_queue = FairQueue(slots=limits.max_num_seqs, max_queued=limits.max_waiting)
        self._tracker = RequestTracker(
            self._fair_queue,
            lambda: self._batcher,
            tokenizer=tokenizer,
            eos_token_ids=eos_ids,
            metrics=metrics,
        )
        self._cache_salts: CacheSalts | None = None
        self.computed_tokens = ComputedTokenCounter(metrics.record_step)
        self._watch_task: asyncio.Task[None] | None = None
        metrics.observe_requests(self.request_counts)
        metrics.observe_health(lambda: self.is_ready)
        self._n_pages = 0  # of the KV cache, which the first batcher allocates
        metrics.observe_kv_cache(self.kv_cache_usage)

    @property
    def is_ready(self) -> bool:
        """Whether requests can be computed now."""
        return self._batcher is not None and self._batcher.is_alive

    @property
    def is_stuck(self) -> bool:
        """Whether a batcher's thread did not end in time and was abandoned."""
        return self._supervisor.is_stuck

    @property
    def is_busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._tracker)

    async def __aenter__(self) -> Self:
        await self._supervisor.start()
        self._watch_task = asyncio.create_task(self._watch(), name="engine-watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch_task is not None:
            self._watch_task.cancel()
            await asyncio.gather(self._watch_task, return_exceptions=True)
        await self._supervisor.stop()
        self._tracker.fail_all("the engine was stopped")

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Set the tenants' shares and prefix-cache groups.

        Args:
            shares: each tenant's share; applies from the next scheduling decision on.
            prefix_groups: each tenant's group; the tenants of a group share the prefix cache. If no
                tenants were set before the engine started, it takes effect at its next restart.
        """
        self._fair_queue.set_shares(shares)
        if self._cache_salts is None:
            self._cache_salts = CacheSalts(self.vocab_size)
        self._cache_salts.set_groups(prefix_groups)

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return the numbers of running and of waiting sequences of a tenant."""
        return self._fair_queue.sequence_counts(tenant)

    def max_sequences(self, tenant: str) -> int:
        """Return how many sequences of a tenant an idle engine could hold."""
        return min(self.limits.max_requests, self._fair_queue.max_sequences(tenant))

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        tenant: str = "",
        usage_recorder: UsageRecorder | None = None,
        journal: Sequence[JournalEntry] = (),
        span: Span = NO_SPAN,
        is_streamed: bool = True,
    ) -> Generation:
        """Queue sequences; the generation's indices are their positions in `requests`.

        Args:
            requests: the sequences, which are scheduled independently.
            tenant: the tenant they are scheduled for.
            usage_recorder: records their usage and outcome.
            journal: what another process has generated of them; it is put out again first.
            span: traces them, and ends with them.
            is_streamed: whether each token is passed on; else some are put out at a time.

        Raises:
            JournalError: the journal is not one of these sequences.
            EngineUnavailable: the engine is not running.
            EngineQueueFull: the engine holds its maximum number of requests.
            TenantQueueFull: the tenant's part of the queue is full.
        """
        if self._batcher is None or not self._batcher.is_alive:
            raise EngineUnavailable("the engine is starting")
        max_requests = self.limits.max_requests
        try:
            if len(self._tracker) + len(requests) > max_requests:
                raise EngineQueueFull(
                    f"{len(self._tracker)} requests are queued or running, "
                    f"at most {max_requests} may be"
                )
            return self._tracker.add_requests(
                requests, tenant, usage_recorder, journal, span, is_streamed=is_streamed
            )
        except QueueFull as error:
            self.metrics.admission_rejections.inc(len(requests))
            error.retry_after_s = self._tracker.seconds_until_place(len(requests))
            raise

    def abort_running(self) -> None:
        """Fail every request, because the server is shutting down."""
        self._tracker.fail_all("the server is shutting down")

    @property
    def _batcher(self) -> ContinuousBatcher | None:
        return self._supervisor.batcher

    def request_counts(self) -> tuple[int, int]:
        """Return the numbers of running and of waiting sequences."""
        if self._batcher is None:
            return 0, self._fair_queue.n_waiting
        running, waiting = self._batcher.request_counts()
        return running, waiting + self._fair_queue.n_waiting

    def kv_cache_usage(self) -> float:
        """Return the part of the KV cache that sequences take, from 0 to 1."""
        return min(1.0, self._tracker.n_pages(TOKENS_PER_PAGE) / max(1, self._n_pages))

    async def _watch(self) -> None:
        """Fail overdue requests and replace a crashed batcher, until the engine gives up."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._tracker.fail_timed_out(time.monotonic(), timeout_s=self._request_timeout_s)
            if self._batcher is None or self._batcher.is_alive:
                continue
            if not await self._replace_batcher():
                self._tracker.fail_all("the engine gave up")
                return

    async def _replace_batcher(self) -> bool:
        """Replace a crashed batcher and resume its requests; return whether one runs again."""
        assert self._batcher is not None
        epoch, error = self._batcher.epoch, self._batcher.fatal_error
        fatal_reason = str(error) if isinstance(error, FATAL_ERRORS) else ""
        logger.error("The engine crashed: %s", repr(error))
        del error  # and with it the frames it was raised in, which hold the cache
        await self._supervisor.stop()
        self._tracker.record_crash(epoch)
        if not await self._supervisor.restart(fatal_reason):
            return False
        assert self._batcher is not None
        self._tracker.resubmit_running(self._batcher)
        self._tracker.schedule()
        return True

    def _make_batcher(self, loop: asyncio.AbstractEventLoop) -> ContinuousBatcher:
        gc.collect()  # a crashed batcher is part of reference cycles, and so is its cache
        batcher = start_batcher(
            self._model,
            self.limits,
            loop,
            on_outputs=self._tracker.process_outputs,
            on_request_error=self._tracker.fail_requests,
            cache_salts=self._cache_salts,
            computed_tokens=self.computed_tokens,
            weight=self._fair_queue.weight,
            on_idle=self._on_idle,
            compute=self._compute,
        )
        self._n_pages = self.limits.n_pages(KVCacheGeometry.from_model(self._model))
        self.metrics.set_cache_config(
            n_pages=self._n_pages,
            page_tokens=TOKENS_PER_PAGE,
            max_model_len=self.limits.max_model_len,
        )
        return batcher
