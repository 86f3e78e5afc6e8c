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

from faasmoe_router.engine.cache_config import TOKENS_PER_PAGE, EngineLimits, KVCacheGeometry
from faasmoe_router.engine.logits_state import LogitsState
from faasmoe_router.errors import EngineUnavailable, GenerationFailed, RouterConfigError
from faasmoe_router.transformers_backend import scheduler
from faasmoe_router.transformers_backend.attention import select_attention_implementation
from faasmoe_router.transformers_backend.error_isolation import BatchErrorIsolation
from faasmoe_router.transformers_backend.idle_reclaim import release_pages
from faasmoe_router.transformers_backend.logits_processor import (
    BatchLogitsProcessor,
    RequestErrorHandler,
)
from faasmoe_router.transformers_backend.prefix_cache import CacheSalts, salt_prefix_cache
from faasmoe_router.transformers_backend.scheduler import ComputedTokenCounter

logger = logging.getLogger(__name__)

NO_EOS_TOKEN_ID = -1
OutputHandler = Callable[[Sequence[Any], Mapping[str, int]], None]
"""Gets outputs, and by request how many tokens of its prompt were in the cache, told once."""
PopCachedTokens = Callable[[Iterable[str]], Mapping[str, int]]


class _EventLoopOutputRouter(OutputRouter):  # type: ignore[misc]
    """Hands every output to one function on the event loop: one wake-up for a batch's outputs.

    transformers' own router keeps a handler for each request, which a cancelled request never
    gives back, and queues for ever what has no handler.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handler: OutputHandler,
        pop_cached_tokens: PopCachedTokens,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._handler = handler
        self._pop_cached_tokens = pop_cached_tokens

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        cached_tokens = self._pop_cached_tokens(output.request_id for output in outputs)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._handler, outputs, cached_tokens)


class ContinuousBatcher:
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
        cache_salts: CacheSalts | None = None,
        computed_tokens: ComputedTokenCounter | None = None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        select_attention_implementation(model)
        self.epoch = object()
        self._limits = limits
        self._cache_salts = cache_salts
        self._computed_tokens = computed_tokens
        self._on_idle = on_idle
        self._report_request_error: RequestErrorHandler = lambda *_: None
        self._manager = self._make_manager(model)

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        on_outputs: OutputHandler,
        on_request_error: RequestErrorHandler,
    ) -> None:
        """Allocate the cache and start the thread.

        Args:
            loop: where both handlers are called.
            handler: gets each batch's outputs.
            on_broken: gets the ids of requests that cannot go on, and why, ahead of their outputs.

        Raises:
            ConfigError: the cache cannot hold one request, or the model cannot be batched.
        """

        def report_error(request_ids: Sequence[str], error: GenerationFailed) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_request_error, request_ids, error)

        self._report_request_error = report_error
        self._manager.output_router = _EventLoopOutputRouter(
            loop, on_outputs, self._pop_cached_tokens
        )
        try:
            self._manager.warmup()
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
            raise RouterConfigError(
                f"kv_cache_bytes: got {self._limits.kv_cache_bytes or 'none'}, expected what is "
                f"free beside the model: {why}"
            ) from error
        except (ValueError, MemoryError, AttributeError) as error:
            raise RouterConfigError(f"model: continuous batching cannot run it: {error}") from error
        self._check_one_request_fits_cache()
        batch_processor = self._manager.batch_processor
        if self._cache_salts is not None:
            salt_prefix_cache(batch_processor.cache, self._cache_salts)
        if self._computed_tokens is not None:
            batch_processor.scheduler.computed_tokens = self._computed_tokens
        batch_processor.scheduler.idle_reclaimer.on_reclaim = self._on_idle
        BatchErrorIsolation(self._manager)
        # Whom the thread leaves behind goes on with another: that is no failure to be told.
        self._manager._fail_all_remaining_requests = lambda *_: None
        release_pages(batch_processor.cache.cache_tensor)
        self._manager.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the batch it computes; return whether it ended in time."""
        self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)
        return not self._manager.is_running()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        accepts = self._manager.background_thread_status.can_accept_new_requests() is None
        return bool(accepts and self._manager.is_running())

    @property
    def fatal_error(self) -> Exception | None:
        """What ended the thread, if something did."""
        error: Exception | None = self._manager.background_thread_status.fatal_error
        return error

    def request_counts(self) -> tuple[int, int]:
        """Return how many requests are computed and how many wait."""
        batch_processor = self._manager.batch_processor
        if batch_processor is None:
            return 0, 0
        request_scheduler = batch_processor.scheduler
        waiting = len(request_scheduler.waiting_requests) + self._manager.input_queue.qsize()
        return len(request_scheduler.active_requests), waiting

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        logits_state: LogitsState | None,
    ) -> None:
        """Queue a request; raises EngineUnavailable if the thread takes none."""
        processor_kwargs = {} if logits_state is None else {"logits_state": logits_state}
        accepted_id = self._manager.add_request(
            list(prompt_token_ids),
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=list(stop_token_ids) or NO_EOS_TOKEN_ID,
            **processor_kwargs,
        )
        if accepted_id is None:
            raise EngineUnavailable("the engine takes no requests at the moment")

    def cancel_request(self, request_id: str) -> None:
        """Free a request before the next batch; it gets no further output."""
        self._manager.cancel_request(request_id)

    def preempt_request(self, request_id: str) -> None:
        """Take a request out of the next batch and its cache; a token may still come."""
        self._manager.batch_processor.scheduler.preempt(request_id)
        self._manager._wake_up_loop.set()

    def resume_request(self, request_id: str) -> None:
        """Let a parked request go on from the tokens that it has."""
        self._manager.batch_processor.scheduler.resume(request_id)
        self._manager._wake_up_loop.set()

    def _pop_cached_tokens(self, request_ids: Iterable[str]) -> Mapping[str, int]:
        cached_tokens: Mapping[str, int] = (
            self._manager.batch_processor.scheduler.pop_cached_tokens(request_ids)
        )
        return cached_tokens

    def _make_manager(self, model: Any) -> Any:
        # The manager asks the model for its processors once, when it is made.
        logits_processor = BatchLogitsProcessor(lambda *broken: self._report_request_error(*broken))
        model._get_logits_processor = lambda _: LogitsProcessorList([logits_processor])
        try:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS_TOKEN_ID),
                continuous_batching_config=self._batching_config(KVCacheGeometry.from_model(model)),
            )
        finally:
            del model._get_logits_processor
        # Counted by transformers only for the processors that it converts itself.
        manager.logit_processor.tensors_required = 1
        return manager

    def _batching_config(self, geometry: KVCacheGeometry) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=TOKENS_PER_PAGE,
            num_blocks=self._limits.n_pages(geometry),
            max_batch_tokens=self._limits.max_num_batched_tokens,
            max_requests_per_batch=self._limits.max_num_seqs,
            scheduler_type=scheduler.register_scheduler(),
            # One tenant's prompt must not speed up another's: that tells what was asked before.
            allow_block_sharing=self._cache_salts is not None,
            # The forward pass calls expert functions, which no graph can hold, and TokenChooser
            # reads the tokens so far, which overlapping batches would not know yet.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )

    def _check_one_request_fits_cache(self) -> None:
        cache = self._manager.batch_processor.cache
        n_required = sum(
            allocator.needs_new_sectors("", 0, self._limits.max_model_len)
            for allocator in cache.cache_allocators.values()
        )
        if n_required > cache.num_sectors:
            raise RouterConfigError(
                f"kv_cache_bytes: got enough for {cache.num_sectors} sectors of the cache, "
                f"expected {n_required} for one request of max_model_len tokens"
            )


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a model's output: none, one, or several."""
    token_ids = model.generation_config.eos_token_id
    if token_ids is None:
        token_ids = model.config.get_text_config().eos_token_id
    if token_ids is None:
        return ()
    return tuple(torch.as_tensor(token_ids).flatten().tolist())
