"""The engine: takes requests on the event loop, runs them in batches, and stays up.

After a fatal error (the batch's thread died) the engine is not ready, and a new batcher is made
over the same model: that takes a cache allocation, where a new process would load the model and
connect to every sandbox again. Requests go on from the tokens that they have; one that ran when a
batcher died and runs when the next one dies may be why, and gets an error. A fault that comes back
uses up the restarts; then the engine gives up and says so, and the process had better end and be
replaced.
"""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from faasmoe_router.engine.cache_config import EngineLimits
from faasmoe_router.engine.fair_queue import FairQueue, Share
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.engine.request_tracker import RequestTracker
from faasmoe_router.engine.structured_output import GrammarCompiler
from faasmoe_router.engine.supervisor import BatcherSupervisor
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import EngineQueueFull, EngineUnavailable
from faasmoe_router.metrics import EngineMetrics
from faasmoe_router.tenants.caller import UsageRecorder
from faasmoe_router.transformers_backend.continuous_batching import ContinuousBatcher, eos_token_ids
from faasmoe_router.transformers_backend.error_isolation import FATAL_ERRORS
from faasmoe_router.transformers_backend.prefix_cache import CacheSalts
from faasmoe_router.transformers_backend.scheduler import ComputedTokenCounter

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class Engine:
    """Generates text for many requests at once; use it as an async context manager.

    Everything but the batches themselves runs on the event loop that entered it. Sequences wait
    here for their turn, by tenant: the batcher is given only what it can compute at once.

    Attributes:
        limits: what the engine may hold.
        codec: the model's tokenizer.
        metrics: what it counts.
        vocabulary: the model's tokens as bytes.
        grammars: compiles what texts are held to.
        computed: tokens that were computed for each tenant.
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
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._model = model
        self._on_idle = on_idle
        self._request_timeout_s = request_timeout_s
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
        self.computed_tokens = ComputedTokenCounter()
        self._watch_task: asyncio.Task[None] | None = None
        metrics.observe_requests(self._request_counts)

    @property
    def is_ready(self) -> bool:
        """Whether requests can be computed now."""
        return self._batcher is not None and self._batcher.is_alive

    @property
    def is_stuck(self) -> bool:
        """Whether a thread was left behind because it did not end in time."""
        return self._supervisor.is_stuck

    @property
    def is_busy(self) -> bool:
        """Whether any request is being computed or waits to be."""
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
        """Serve tenants, by their shares, from the next turn on.

        Args:
            shares: what each is entitled to.
            prefix_groups: each one's group; the prompts of a group share the cache of their
                beginnings, from the engine's next start on if it has served none yet.
        """
        self._fair_queue.set_shares(shares)
        if self._cache_salts is None:
            self._cache_salts = CacheSalts(self.vocab_size)
        self._cache_salts.set_groups(prefix_groups)

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return how many sequences of a tenant run, and how many wait."""
        return self._fair_queue.sequence_counts(tenant)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        tenant: str = "",
        usage_recorder: UsageRecorder | None = None,
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
        if self._batcher is None or not self._batcher.is_alive:
            raise EngineUnavailable("the engine is starting")
        max_requests = self.limits.max_requests
        if len(self._tracker) + len(requests) > max_requests:
            raise EngineQueueFull(
                f"{len(self._tracker)} requests are queued or running, at most {max_requests} may be"
            )
        return self._tracker.add_requests(requests, tenant, usage_recorder)

    def abort_running(self) -> None:
        """End every request by an error, as when the server is about to end."""
        self._tracker.fail_all("the server is shutting down")

    @property
    def _batcher(self) -> ContinuousBatcher | None:
        return self._supervisor.batcher

    def _request_counts(self) -> tuple[int, int]:
        if self._batcher is None:
            return 0, self._fair_queue.n_waiting
        running, waiting = self._batcher.request_counts()
        return running, waiting + self._fair_queue.n_waiting

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._tracker.fail_timed_out(time.monotonic(), timeout_s=self._request_timeout_s)
            if self._batcher is None or self._batcher.is_alive:
                continue
            if not await self._replace_batcher():
                self._tracker.fail_all("the engine gave up")
                return

    async def _replace_batcher(self) -> bool:
        """Put another batcher in the place of one that has died; return whether that was done."""
        assert self._batcher is not None
        epoch, error = self._batcher.epoch, self._batcher.fatal_error
        fatal_reason = str(error) if isinstance(error, FATAL_ERRORS) else ""
        logger.error("The engine crashed: %s", repr(error))
        del error  # and with it the frames that it was raised in, which hold the cache
        await self._supervisor.stop()
        self._tracker.record_crash(epoch)
        if not await self._supervisor.restart(fatal_reason):
            return False
        assert self._batcher is not None
        self._tracker.resubmit_running(self._batcher)
        self._tracker.schedule()
        return True

    def _make_batcher(self, loop: asyncio.AbstractEventLoop) -> ContinuousBatcher:
        gc.collect()  # one that has died is a knot of references, its cache among them
        batcher = ContinuousBatcher(
            self._model,
            self.limits,
            cache_salts=self._cache_salts,
            computed_tokens=self.computed_tokens,
            on_idle=self._on_idle,
        )
        batcher.start(loop, self._tracker.process_outputs, self._tracker.fail_requests)
        return batcher
