"""Continuous batching: the one place that knows transformers' manager and its thread.

One Batcher is one run of the engine's thread. After a fatal error it is thrown away and another is
made; the model stays.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.logits_process import LogitsProcessorList

from faasmoe_router.engine import scheduler
from faasmoe_router.engine.attention import use_batchable_attention
from faasmoe_router.engine.isolation import Isolation
from faasmoe_router.engine.memory import release
from faasmoe_router.engine.prefixes import PrefixRealms, keep_apart
from faasmoe_router.engine.processor import BrokenHandler, TokenChooser
from faasmoe_router.engine.scheduler import ComputedTokens
from faasmoe_router.engine.sizing import PAGE_TOKENS, EngineLimits, Geometry
from faasmoe_router.engine.steps import Steps
from faasmoe_router.errors import ConfigError, EngineUnavailable, GenerationFailed

logger = logging.getLogger(__name__)

NO_EOS = -1
OutputHandler = Callable[[Sequence[Any], Mapping[str, int]], None]
"""Gets outputs, and by request how many tokens of its prompt were in the cache, told once."""
TakeCached = Callable[[Iterable[str]], Mapping[str, int]]


class _LoopRouter(OutputRouter):  # type: ignore[misc]
    """Hands every output to one function on the event loop: one wake-up for a batch's outputs.

    transformers' own router keeps a handler for each request, which a cancelled request never
    gives back, and queues for ever what has no handler.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, handler: OutputHandler, take_cached: TakeCached
    ) -> None:
        super().__init__()
        self._loop = loop
        self._handler = handler
        self._take_cached = take_cached

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        cached = self._take_cached(output.request_id for output in outputs)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._handler, outputs, cached)


class Batcher:
    """Runs requests through the model in one batch after another, on a thread of its own.

    Args:
        model: the router's model.
        limits: what may be held.
        realms: whose prompts may share the cache of their beginnings; None shares nothing.
        computed: where the tokens of each batch are counted.
        on_idle: gives back what others keep for requests, once there has been none for a while.

    Attributes:
        life: no other batcher has the same; to know it by when its cache is to be freed.
    """

    def __init__(
        self,
        model: Any,
        limits: EngineLimits,
        *,
        realms: PrefixRealms | None = None,
        computed: ComputedTokens | None = None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        use_batchable_attention(model)
        self.life = object()
        self._limits = limits
        self._realms = realms
        self._computed = computed
        self._on_idle = on_idle
        self._report_broken: BrokenHandler = lambda *_: None
        self._manager = self._make_manager(model)

    def start(
        self, loop: asyncio.AbstractEventLoop, handler: OutputHandler, on_broken: BrokenHandler
    ) -> None:
        """Allocate the cache and start the thread.

        Args:
            loop: where both handlers are called.
            handler: gets each batch's outputs.
            on_broken: gets the ids of requests that cannot go on, and why, ahead of their outputs.

        Raises:
            ConfigError: the cache cannot hold one request, or the model cannot be batched.
        """

        def report(request_ids: Sequence[str], error: GenerationFailed) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_broken, request_ids, error)

        self._report_broken = report
        self._manager.output_router = _LoopRouter(loop, handler, self._take_cached)
        try:
            self._manager.warmup()
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(
                f"kv_cache_bytes: got {self._limits.kv_cache_bytes or 'none'}, expected what is "
                f"free beside the model: {why}"
            ) from error
        except (ValueError, MemoryError, AttributeError) as error:
            raise ConfigError(f"model: continuous batching cannot run it: {error}") from error
        self._check_one_request_fits()
        processor = self._manager.batch_processor
        if self._realms is not None:
            keep_apart(processor.cache, self._realms)
        if self._computed is not None:
            processor.scheduler.computed = self._computed
        processor.scheduler.memory.also = self._on_idle
        Isolation(self._manager)
        # Whom the thread leaves behind goes on with another: that is no failure to be told.
        self._manager._fail_all_remaining_requests = lambda *_: None
        release(processor.cache.cache_tensor)
        self._manager.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the batch it computes; return whether it ended in time."""
        self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)
        return not self._manager.is_running()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        accepts = self._manager.background_thread_status.can_accept_new_requests() is None
        return bool(accepts and self._manager.is_running())

    @property
    def fatal_error(self) -> Exception | None:
        """What ended the thread, if something did."""
        error: Exception | None = self._manager.background_thread_status.fatal_error
        return error

    def counts(self) -> tuple[int, int]:
        """Return how many requests are computed and how many wait."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0, 0
        requests = processor.scheduler
        waiting = len(requests.waiting_requests) + self._manager.input_queue.qsize()
        return len(requests.active_requests), waiting

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        end_ids: Sequence[int],
        steps: Steps | None,
    ) -> None:
        """Queue a request; raises EngineUnavailable if the thread takes none."""
        asked = {} if steps is None else {"steps": steps}
        accepted = self._manager.add_request(
            list(prompt_ids),
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=list(end_ids) or NO_EOS,
            **asked,
        )
        if accepted is None:
            raise EngineUnavailable("the engine takes no requests at the moment")

    def cancel(self, request_id: str) -> None:
        """Free a request before the next batch; it gets no further output."""
        self._manager.cancel_request(request_id)

    def park(self, request_id: str) -> None:
        """Take a request out of the next batch and its cache; a token may still come."""
        self._manager.batch_processor.scheduler.park(request_id)
        self._manager._wake_up_loop.set()

    def resume(self, request_id: str) -> None:
        """Let a parked request go on from the tokens that it has."""
        self._manager.batch_processor.scheduler.resume(request_id)
        self._manager._wake_up_loop.set()

    def _take_cached(self, request_ids: Iterable[str]) -> Mapping[str, int]:
        found: Mapping[str, int] = self._manager.batch_processor.scheduler.take_cached(request_ids)
        return found

    def _make_manager(self, model: Any) -> Any:
        # The manager asks the model for its processors once, when it is made.
        chooser = TokenChooser(lambda *broken: self._report_broken(*broken))
        model._get_logits_processor = lambda _: LogitsProcessorList([chooser])
        try:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS),
                continuous_batching_config=self._batching_config(Geometry.of(model)),
            )
        finally:
            del model._get_logits_processor
        # Counted by transformers only for the processors that it converts itself.
        manager.logit_processor.tensors_required = 1
        return manager

    def _batching_config(self, geometry: Geometry) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=self._limits.n_pages(geometry),
            max_batch_tokens=self._limits.max_num_batched_tokens,
            max_requests_per_batch=self._limits.max_num_seqs,
            scheduler_type=scheduler.register(),
            # One tenant's prompt must not speed up another's: that tells what was asked before.
            allow_block_sharing=self._realms is not None,
            # The forward pass calls expert functions, which no graph can hold, and TokenChooser
            # reads the tokens so far, which overlapping batches would not know yet.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )

    def _check_one_request_fits(self) -> None:
        cache = self._manager.batch_processor.cache
        n_needed = sum(
            allocator.needs_new_sectors("", 0, self._limits.max_model_len)
            for allocator in cache.cache_allocators.values()
        )
        if n_needed > cache.num_sectors:
            raise ConfigError(
                f"kv_cache_bytes: got enough for {cache.num_sectors} sectors of the cache, "
                f"expected {n_needed} for one request of max_model_len tokens"
            )


def eos_ids_of(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a model's output: none, one, or several."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return ()
    return tuple(torch.as_tensor(found).flatten().tolist())
