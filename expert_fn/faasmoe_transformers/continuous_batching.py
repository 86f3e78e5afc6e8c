"""Continuous batching: runs requests through a model on transformers' manager and its thread.

A ContinuousBatcher is one run of the manager's thread. After a fatal error it is discarded and
replaced by a new one over the same model. Scheduling order, sampling, classification of errors and
sharing of the prefix cache belong to the caller, who passes them in.

transformers samples with one setting for all requests and takes the argmax of the processed scores.
Here each request may carry a sampling state of its own: the logits processor extracts from
transformers' request objects what the caller's sampler needs, and the sampler edits the scores so
that the argmax of every row is the token it selected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from faasmoe_kernels.router_ops import Draw
from faasmoe_transformers.error_isolation import BatchErrorIsolation, ErrorPolicy
from faasmoe_transformers.errors import CacheAllocationFailed, CacheTooSmall, UnsupportedModel
from faasmoe_transformers.generation_step import GenerationStep
from faasmoe_transformers.native_attention import use_native_attention
from faasmoe_transformers.native_step import ComputeMode, restore_modules, use_native_step
from faasmoe_transformers.prefix_cache import SaltTokens, salt_prefix_cache
from faasmoe_transformers.scheduler import BatchCounter, PromptDivider, register_scheduler
from faasmoe_transformers.untouched_zeros import UntouchedZeros

SamplerRow = tuple[int, Any, list[int], list[int]]
"""A row of the scores, its request's sampling state, and the request's initial and generated
tokens: transformers' own lists, not to be modified. After a preemption the initial tokens include
the output so far."""


class TokenSampler(Protocol):
    """Samples the next tokens of a batch; called on the engine's thread only."""

    request_state_type: type
    """Type of the sampling state that a request may carry."""

    def plan_batch(self, request_ids: list[str], rows: Sequence[SamplerRow]) -> None:
        """Prepare for the next scores.

        Args:
            request_ids: the requests by row of the scores.
            rows: the rows whose requests have a sampling state.
        """

    def draws(self) -> Sequence[Draw] | None:
        """Return what is drawn from the planned rows' scores as they are.

        Tokens of rows without a draw are the argmax. None: scores have to be edited first, and
        `sample` is called.
        """

    def accept_drawn(self, peaks: Sequence[float]) -> None:
        """Take note that the tokens were chosen as `draws` tells.

        `sample` is not called then.

        Args:
            peaks: the highest score of each row; NaN if one is.
        """

    def sample(self, scores: Tensor) -> Tensor:
        """Return scores [N, V] whose argmax is each row's token; may modify them in place."""


class BatchLogitsProcessor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Calls a BatchSampler for each batch.

    Args:
        sampler: samples for all requests of the batch.
    """

    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sampler: TokenSampler) -> None:
        self.supported_kwargs: dict[str, type] = {"logits_state": sampler.request_state_type}
        self._plan_batch = sampler.plan_batch
        self.sample = sampler.sample
        self.draws = sampler.draws
        self.accept_drawn = sampler.accept_drawn

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Zero the argument row that transformers reserves; it carries no information."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Pass the requests behind the rows of the next scores to the sampler; return zeros [N]."""
        self.plan(requests_with_new_token)
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def plan(self, requests_with_new_token: list[Any]) -> None:
        """Pass the requests behind the rows of the next scores to the sampler."""
        request_ids: list[str] = []
        rows: list[SamplerRow] = []
        for row, request in enumerate(requests_with_new_token):
            state = request.state
            request_ids.append(state.request_id)
            logits_state = state.logit_processor_kwargs.get("logits_state")
            if logits_state is not None:
                rows.append((row, logits_state, state.initial_tokens, state.generated_tokens))
        self._plan_batch(request_ids, rows)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores whose argmax is each request's token, [N, V]."""
        return self.sample(scores)


NO_EOS_TOKEN_ID = -1


class BatchOutput(Protocol):
    """The output of one request after a batch; transformers' own object, to be read only.

    Attributes:
        request_id: the request.
        generated_tokens: tokens generated since the request was added to this batcher.
        error: why the request failed; None if it did not.
    """

    request_id: str
    generated_tokens: list[int]
    error: str | None

    def is_finished(self) -> bool:
        """Return whether the batcher is done with the request."""


OutputHandler = Callable[[Sequence[BatchOutput], Mapping[str, int]], None]
"""Receives a batch's outputs and, once per request, the tokens of its prompt that were cached."""
PopCachedTokens = Callable[[Iterable[str]], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """Sizes of the cache and of a batch.

    Attributes:
        n_pages: pages of the KV cache.
        page_tokens: tokens per page.
        max_batch_tokens: tokens computed in one batch.
        max_requests: requests computed in one batch.
        max_model_len: tokens of one request, prompt and output together.
    """

    n_pages: int
    page_tokens: int
    max_batch_tokens: int
    max_requests: int
    max_model_len: int


class ContinuousBatcher:
    """Runs requests through a model in successive batches, on a thread of its own.

    Args:
        model: the model, with the attention implementation selected.
        limits: sizes of the cache and of a batch.
        sampler: samples the tokens of each batch, on the batcher's thread.
        salt_tokens: which requests share the prefix cache; None disables it.
        count_batch: receives what each batch computes of its requests before it is computed.
        divide_prompts: divides a batch between prompts; None computes them one after the other.
        error_policy: how errors of a batch are classified.
        compute: what computes the model.
        on_idle: releases what others keep for requests once none has been present for a while.

    Attributes:
        epoch: identity of this batcher; compares unequal to every other batcher's.
    """

    def __init__(
        self,
        model: Any,
        limits: BatchingLimits,
        *,
        sampler: TokenSampler,
        salt_tokens: SaltTokens | None = None,
        count_batch: BatchCounter | None = None,
        divide_prompts: PromptDivider | None = None,
        error_policy: ErrorPolicy | None = None,
        compute: ComputeMode = "auto",
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = object()
        self._limits = limits
        self._salt_tokens = salt_tokens
        self._count_batch = count_batch
        self._divide_prompts = divide_prompts
        self._error_policy = error_policy or ErrorPolicy()
        self._on_idle = on_idle
        self._compute = compute
        self._logits_processor = BatchLogitsProcessor(sampler)
        self._manager = self._make_manager(model)

    def start(self, loop: asyncio.AbstractEventLoop, on_outputs: OutputHandler) -> None:
        """Allocate the cache and start the thread.

        Args:
            loop: event loop on which `on_outputs` is called.
            on_outputs: receives each batch's outputs.

        Raises:
            CacheAllocationFailed: the device has no room for the cache.
            CacheTooSmall: the cache cannot hold one request of `max_model_len` tokens.
            UnsupportedModel: continuous batching cannot run the model.
        """
        outputs = EventLoopOutputRouter(loop, on_outputs, self._pop_cached_tokens)
        self._manager.output_router = outputs
        # Would seed generators that nobody draws from; for that, torch formats a traceback of each
        # device's, for which a router would read 10,000 lines of sources.
        self._manager.distributed_helper.set_tp_seed = lambda *_: None
        try:
            with UntouchedZeros():
                self._manager.warmup()
        except torch.OutOfMemoryError as error:
            raise CacheAllocationFailed(str(error).partition("\n")[0]) from error
        except (ValueError, MemoryError, AttributeError) as error:
            raise UnsupportedModel(str(error)) from error
        self._check_one_request_fits_cache()
        batch_processor = self._manager.batch_processor
        if self._compute == "auto":
            use_native_step(self._manager.model, batch_processor, self._logits_processor)
        step = batch_processor._generation_step
        if isinstance(step, GenerationStep):
            outputs.is_holding = True
            step.before_run = batch_processor.scheduler.on_no_batch = outputs.release
        if self._salt_tokens is not None:
            salt_prefix_cache(batch_processor.cache, self._salt_tokens)
        if self._count_batch is not None:
            batch_processor.scheduler.count_batch = self._count_batch
        batch_processor.scheduler.divide_prompts = self._divide_prompts
        batch_processor.scheduler.idle_reclaimer.on_reclaim = self._on_idle
        BatchErrorIsolation(self._manager, self._error_policy)
        # Requests that remain when the thread ends do not fail: another batcher resumes them.
        self._manager._fail_all_remaining_requests = lambda *_: outputs.release()
        self._manager.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the current batch; return whether it ended within `timeout_s`."""
        join = self._manager.join

        def wake_and_join(*args: Any, **kwargs: Any) -> None:
            self._manager._wake_up_loop.set()  # it looks for requests ten times a second
            join(*args, **kwargs)

        self._manager.join = wake_and_join
        self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)
        return not self._manager.is_running()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and accepts requests."""
        accepts = self._manager.background_thread_status.can_accept_new_requests() is None
        return bool(accepts and self._manager.is_running())

    @property
    def fatal_error(self) -> Exception | None:
        """The error that ended the thread, if one did."""
        error: Exception | None = self._manager.background_thread_status.fatal_error
        return error

    def request_counts(self) -> tuple[int, int]:
        """Return the numbers of running and of waiting requests."""
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
        logits_state: Any = None,
    ) -> bool:
        """Queue a request.

        Args:
            request_id: id of the request; none with the same id may be present.
            prompt_token_ids: tokens of the prompt.
            max_tokens: maximum number of tokens to generate.
            stop_token_ids: tokens that end the output.
            logits_state: the request's sampling state, passed to the sampler with each batch; None
                if its tokens are the argmax of the model's scores.

        Returns:
            Whether the request was accepted; the thread accepts none once it ends.
        """
        processor_kwargs = {} if logits_state is None else {"logits_state": logits_state}
        accepted_id = self._manager.add_request(
            list(prompt_token_ids),
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=list(stop_token_ids) or NO_EOS_TOKEN_ID,
            **processor_kwargs,
        )
        return accepted_id is not None

    def cancel_request(self, request_id: str) -> None:
        """Remove a request before the next batch; it gets no further output."""
        self._manager.cancel_request(request_id)

    def preempt_request(self, request_id: str) -> None:
        """Remove a request and its cache from the next batch; one more token may still arrive."""
        self._manager.batch_processor.scheduler.preempt(request_id)
        self._manager._wake_up_loop.set()

    def resume_request(self, request_id: str) -> None:
        """Continue a preempted request from the tokens it has."""
        self._manager.batch_processor.scheduler.resume(request_id)
        self._manager._wake_up_loop.set()

    def n_shareable_tokens(self, request_id: str, prompt_token_ids: Sequence[int]) -> int:
        """Return how many of a prompt's tokens later prompts can find in the prefix cache.

        Those are whole pages; 0 if the request shares nothing.
        """
        is_shared = (
            self._salt_tokens is not None
            and self._manager.batch_processor.cache.use_prefix_sharing
            and self._salt_tokens(request_id, prompt_token_ids[:1]) is not None
        )
        page_tokens = self._limits.page_tokens
        return len(prompt_token_ids) // page_tokens * page_tokens if is_shared else 0

    def _pop_cached_tokens(self, request_ids: Iterable[str]) -> Mapping[str, int]:
        cached_tokens: Mapping[str, int] = (
            self._manager.batch_processor.scheduler.pop_cached_tokens(request_ids)
        )
        return cached_tokens

    def _make_manager(self, model: Any) -> Any:
        restore_modules(model)
        # The manager asks the model for its processors once, when it is created.
        processors = LogitsProcessorList([self._logits_processor])
        model._get_logits_processor = lambda _: processors
        try:
            manager = _init_manager(model, self._batching_config())
        finally:
            del model._get_logits_processor
        if self._compute != "torch":
            use_native_attention(model)
        # transformers counts only the processors that it converts itself.
        manager.logit_processor.tensors_required = 1
        return manager

    def _batching_config(self) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=self._limits.page_tokens,
            num_blocks=self._limits.n_pages,
            max_batch_tokens=self._limits.max_batch_tokens,
            max_requests_per_batch=self._limits.max_requests,
            scheduler_type=register_scheduler(),
            # Without salts, prompt latency would reveal what another tenant had asked before.
            allow_block_sharing=self._salt_tokens is not None,
            # The forward pass calls expert functions, which a CUDA graph cannot capture, and the
            # sampler reads the tokens so far, which overlapping batches would not have yet.
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
            raise CacheTooSmall(cache.num_sectors, n_required)


class EventLoopOutputRouter(OutputRouter):  # type: ignore[misc]
    """Delivers a batch's outputs to one handler on the event loop, with one wake-up per batch.

    While the event loop handles outputs it has the interpreter, which the batcher's thread needs to
    prepare the next batch. So a batch's outputs can be held until the next one is computed without
    the interpreter, or until there is none. They are not if a request ends, which makes room for
    another in the next batch.

    transformers' own router keeps a handler per request, which is never removed for a cancelled
    request, and queues outputs without a handler forever.

    Args:
        loop: the event loop.
        handler: receives outputs on it.
        pop_cached_tokens: returns, once per request, the tokens of its prompt that were cached.

    Attributes:
        is_holding: whether batches in which no request ends are held until `release`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handler: OutputHandler,
        pop_cached_tokens: PopCachedTokens,
    ) -> None:
        super().__init__()
        self.is_holding = False
        self._loop = loop
        self._handler = handler
        self._pop_cached_tokens = pop_cached_tokens
        self._held: list[Any] = []

    def deliver(self, output: Any) -> None:
        """Deliver a single output, after those that are held."""
        self._held.append(output)
        self.release()

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Deliver a batch's outputs, or hold them."""
        self._held += outputs
        if not self.is_holding or any(output.is_finished() for output in outputs):
            self.release()

    def release(self) -> None:
        """Deliver what is held, unless the event loop is closed; on the batcher's thread."""
        if not self._held:
            return
        outputs, self._held = self._held, []
        cached_tokens = self._pop_cached_tokens(output.request_id for output in outputs)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._handler, outputs, cached_tokens)


class _CallbackOutputRouter(OutputRouter):  # type: ignore[misc]
    """Calls one function with each batch's outputs, on the manager's thread."""

    def __init__(self, handler: Callable[[Sequence[BatchOutput]], None]) -> None:
        super().__init__()
        self._handler = handler

    def deliver(self, output: Any) -> None:
        """Deliver a single output."""
        self._handler([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Deliver a batch's outputs."""
        self._handler(outputs)


def create_plain_manager(
    model: Any,
    config: ContinuousBatchingConfig,
    on_outputs: Callable[[Sequence[BatchOutput]], None],
) -> Any:
    """Create a ContinuousBatchingManager of transformers as it is, to compare with.

    Args:
        model: the model.
        config: the manager's config.
        on_outputs: receives each batch's outputs, on the manager's thread.
    """
    manager = _init_manager(model, config)
    manager.output_router = _CallbackOutputRouter(on_outputs)
    return manager


def _init_manager(model: Any, config: ContinuousBatchingConfig) -> Any:
    return model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS_TOKEN_ID),
        continuous_batching_config=config,
    )


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a model's output: none, one or several."""
    token_ids = model.generation_config.eos_token_id
    if token_ids is None:
        token_ids = model.config.get_text_config().eos_token_id
    if token_ids is None:
        return ()
    return tuple(torch.as_tensor(token_ids).flatten().tolist())
