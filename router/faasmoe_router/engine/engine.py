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

from faasmoe_router.engine.batching import Batcher, eos_ids_of
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.engine.grammar import GrammarCompiler
from faasmoe_router.engine.held import Held
from faasmoe_router.engine.isolation import FINAL
from faasmoe_router.engine.keeper import BatcherKeeper
from faasmoe_router.engine.prefixes import PrefixRealms
from faasmoe_router.engine.scheduler import ComputedTokens
from faasmoe_router.engine.sizing import EngineLimits
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import EngineSaturated, EngineUnavailable
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
        metrics: what it counts.
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
        self.metrics = metrics
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._model = model
        self._on_idle = on_idle
        self._request_timeout_s = request_timeout_s
        eos_ids = eos_ids_of(model)
        self.vocabulary = codec.vocabulary(n_tokens=self.vocab_size, eos_ids=eos_ids)
        self.grammars = GrammarCompiler(self.vocabulary)
        self._keeper = BatcherKeeper(lambda loop: self._make_batcher(loop), on_give_up=on_give_up)
        self._turns = FairQueue(slots=limits.max_num_seqs, max_queued=limits.max_waiting)
        self._held = Held(
            self._turns, lambda: self._batcher, codec=codec, eos_ids=eos_ids, metrics=metrics
        )
        self._realms: PrefixRealms | None = None
        self.computed = ComputedTokens()
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
        return bool(self._held)

    async def __aenter__(self) -> Self:
        await self._keeper.start()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._keeper.stop()
        self._held.fail_all("the engine was stopped")

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
        if len(self._held) + len(requests) > capacity:
            raise EngineSaturated(f"{len(self._held)} requests are held, at most {capacity} may be")
        return self._held.add(requests, tenant, ticket)

    def end_running(self) -> None:
        """End every request by an error, as when the server is about to end."""
        self._held.fail_all("the server ends")

    @property
    def _batcher(self) -> Batcher | None:
        return self._keeper.batcher

    def _counts(self) -> tuple[int, int]:
        if self._batcher is None:
            return 0, self._turns.n_waiting
        running, waiting = self._batcher.counts()
        return running, waiting + self._turns.n_waiting

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._held.end_overdue(time.monotonic(), timeout_s=self._request_timeout_s)
            if self._batcher is None or self._batcher.alive:
                continue
            if not await self._replace():
                self._held.fail_all("the engine gave up")
                return

    async def _replace(self) -> bool:
        """Put another batcher in the place of one that has died; return whether that was done."""
        assert self._batcher is not None
        life, error = self._batcher.life, self._batcher.fatal_error
        why_final = str(error) if isinstance(error, FINAL) else ""
        logger.error("The engine died: %s", repr(error))
        del error  # and with it the frames that it was raised in, which hold the cache
        await self._keeper.stop()
        self._held.note_death(life)
        if not await self._keeper.restart(why_final):
            return False
        assert self._batcher is not None
        self._held.take_over(self._batcher)
        self._held.give_turns()
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
        batcher.start(loop, self._held.take_outputs, self._held.take_broken)
        return batcher
