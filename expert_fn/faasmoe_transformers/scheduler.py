"""The scheduler of continuous batching: transformers' FIFO scheduler with preemption.

The tokens of a batch that running requests leave are divided between prompts by the caller.
Requests can be preempted: they leave the batch and the cache between two batches and are resumed
later from the tokens they have, as transformers does itself when the cache is full. The scheduler
also reports the tokens computed per request and how much of a prompt came from the prefix cache,
and observes, on the engine's thread about ten times a second, whether any request is present.

While none is, `IdleMemoryReclaimer` returns the memory of the KV cache to the operating system:
torch zeroes a new cache by writing to all of it, so an idle router on CPU would keep its whole KV
cache resident, 1.8 GB of a 2 GB budget with the demo model. What requests wrote also stays resident
after they end, in the cache and in the heap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from faasmoe_transformers.tensor_pages import release_pages

IDLE_RECLAIM_DELAY_S = 1.0
PREFIX_CACHE_RECLAIM_DELAY_S = 60.0
"""The delay with a prefix cache: cached prompts are worth more than the memory they take."""


class IdleMemoryReclaimer:
    """Releases what requests used once none has been present for a while.

    Called by the thread that computes batches, so nothing is computed during a reclaim.

    Args:
        cache: the KV cache.
        evict_cached_blocks: drops the blocks that ended requests left in the prefix cache.
        idle_delay_s: seconds without a request before memory is released.

    Attributes:
        on_reclaim: called after the cache was released, to release what others keep for requests.
    """

    def __init__(
        self,
        cache: Tensor,
        *,
        evict_cached_blocks: Callable[[], object],
        idle_delay_s: float = IDLE_RECLAIM_DELAY_S,
    ) -> None:
        self.on_reclaim: Callable[[], None] = lambda: None
        self._cache = cache
        self._evict_cached_blocks = evict_cached_blocks
        self._idle_delay_s = idle_delay_s
        self._idle_since_s: float | None = None
        self._has_unreclaimed = False

    def observe(self, now_s: float, *, is_idle: bool) -> None:
        """Record whether any request is present, and release memory when it is time to.

        Args:
            now_s: monotonic time in seconds.
            is_idle: whether there is no request, running or waiting.
        """
        if not is_idle:
            self._idle_since_s, self._has_unreclaimed = None, True
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif self._has_unreclaimed and now_s - self._idle_since_s >= self._idle_delay_s:
            self._has_unreclaimed = False
            self._evict_cached_blocks()
            release_pages(self._cache)
            self.on_reclaim()


SCHEDULER_NAME = "faasmoe_fifo"


class ComputedTokens(NamedTuple):
    """What a batch computes of one request.

    Attributes:
        request_id: the request.
        n_tokens: tokens of its prompt or answer whose keys and values are computed.
        ends_prompt: whether they are the last ones of the prompt, so that its first token follows.
    """

    request_id: str
    n_tokens: int
    ends_prompt: bool = False


BatchCounter = Callable[[Sequence[ComputedTokens]], None]
"""Receives each batch before it is computed."""


PromptDivider = Callable[[Sequence[tuple[str, int]], Sequence[str], int], Mapping[str, int]]
"""Returns how many tokens of which prompts the next batch computes, in the order to compute them.

It receives the prompts as (request id, tokens that are left) in the order of their arrival, the ids
of the requests that generate a token each, and the tokens of a batch; those together and what it
returns are no more than that.
"""


def _computed_tokens(scheduled: Any) -> ComputedTokens:
    """Return what a batch computes of a request that transformers has scheduled for it."""
    state, n_tokens = scheduled.state, scheduled.query_length
    ends_prompt = state.position_offset + n_tokens == len(state.initial_tokens)
    return ComputedTokens(state.request_id, n_tokens, ends_prompt)


class PreemptibleFIFOScheduler(FIFOScheduler):  # type: ignore[misc]
    """Computes requests in the order of their arrival, unless `divide_prompts` has another.

    When the cache is full, transformers admits no request until a running one finishes. If all
    running requests are cancelled or preempted instead, waiting ones would never be admitted; this
    class unblocks them.

    Attributes:
        count_batch: called with every batch before it is computed.
        divide_prompts: divides a batch between prompts; None computes them one after the other.
        idle_reclaimer: releases memory once no request has been present for a while.
        on_no_batch: called where no batch follows the last one at once.
    """

    def __init__(self, cache: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cache, *args, **kwargs)
        self.count_batch: BatchCounter = lambda _: None
        self.divide_prompts: PromptDivider | None = None
        self.on_no_batch: Callable[[], object] = lambda: None
        self.idle_reclaimer = IdleMemoryReclaimer(
            cache.cache_tensor,
            evict_cached_blocks=cache.evict_cached_blocks,
            idle_delay_s=PREFIX_CACHE_RECLAIM_DELAY_S
            if cache.allow_block_sharing
            else IDLE_RECLAIM_DELAY_S,
        )

    def reset(self) -> None:
        """Reset for a new generation loop."""
        super().reset()
        self._pending_actions: deque[tuple[Literal["preempt", "resume"], str]] = deque()
        self._preempted: dict[str, Any] = {}
        self._n_cached_tokens: dict[str, int] = {}
        self._prompt_parts: Mapping[str, int] = {}  # of the batch that is being scheduled

    def preempt(self, request_id: str) -> None:
        """Remove a request from the batches, from the next one on; callable from any thread."""
        self._pending_actions.append(("preempt", request_id))

    def resume(self, request_id: str) -> None:
        """Queue a preempted request again; callable from any thread."""
        self._pending_actions.append(("resume", request_id))

    def clear_cancelled_requests(self) -> list[Any]:
        """Apply pending preemptions, then remove cancelled requests; return their states.

        transformers calls this between two batches.
        """
        while self._pending_actions:
            action, request_id = self._pending_actions.popleft()
            self._preempt_now(request_id) if action == "preempt" else self._resume_now(request_id)
        for request_id in list(self._requests_to_cancel):
            self._resume_now(request_id)
        cancelled: list[Any] = super().clear_cancelled_requests()
        self.pop_cached_tokens(state.request_id for state in cancelled)
        if cancelled:
            self.block_new_requests = False
        is_idle = not self.has_pending_requests()
        self.idle_reclaimer.observe(time.monotonic(), is_idle=is_idle)
        if is_idle:
            self.on_no_batch()
        return cancelled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, ...]:
        """Schedule the next batch and report it to `count_batch`."""
        scheduled: tuple[Any, ...] = super().schedule_batch(token_budget, cache_budget)
        if scheduled[0] is None and self._prompt_parts:  # the cache has no room for these prompts
            divide_prompts, self.divide_prompts = self.divide_prompts, None
            try:
                scheduled = super().schedule_batch(token_budget, cache_budget)
            finally:
                self.divide_prompts = divide_prompts
        batch = scheduled[0] or ()
        if not batch:
            self.on_no_batch()
        self.count_batch([_computed_tokens(each) for each in batch])
        return scheduled

    def pop_cached_tokens(self, request_ids: Iterable[str]) -> Mapping[str, int]:
        """Return, once per request, how many tokens of its prompt were in the prefix cache."""
        return {
            request_id: self._n_cached_tokens.pop(request_id)
            for request_id in request_ids
            if request_id in self._n_cached_tokens
        }

    def _process_candidates(
        self, candidates: list[Any], token_budget: int, *args: Any
    ) -> tuple[Any, ...]:
        n_running = sum(state.status == RequestStatus.DECODING for state in candidates)
        prompts = candidates[n_running:]  # they come after
        self._prompt_parts = {}
        if prompts and self.divide_prompts is not None:
            self._prompt_parts = self.divide_prompts(
                [(state.request_id, len(state.remaining_prefill_tokens)) for state in prompts],
                [state.request_id for state in candidates[:n_running]],
                token_budget,
            )
            by_id = {state.request_id: state for state in prompts}
            parts = [by_id[request_id] for request_id in self._prompt_parts]
            candidates = [*candidates[:n_running], *parts]
        scheduled: tuple[Any, ...] = super()._process_candidates(candidates, token_budget, *args)
        return scheduled

    def _schedule_request(
        self, state: Any, request_tokens: list[int], token_budget: int, *args: Any
    ) -> None:
        if state.status != RequestStatus.DECODING:
            token_budget = min(token_budget, self._prompt_parts.get(state.request_id, token_budget))
        super()._schedule_request(state, request_tokens, token_budget, *args)

    def _infer_request_tokens(self, state: Any, *args: Any) -> list[int]:
        n_before = len(state.remaining_prefill_tokens)
        tokens: list[int] = super()._infer_request_tokens(state, *args)
        n_cached = n_before - len(state.remaining_prefill_tokens)
        if n_cached > 0 and not (state.generated_tokens or state._true_initial_tokens):
            self._n_cached_tokens[state.request_id] = n_cached
        return tokens

    def _preempt_now(self, request_id: str) -> None:
        state = self.waiting_requests.pop(request_id, None)
        if state is not None:
            self.waiting_requests_order.remove(request_id)
        elif (active := self.active_requests.get(request_id)) is not None:
            state = active.create_equivalent_initial_request()
            active._status = RequestStatus.FINISHED  # its setter would log the end of a request
            self.finish_request(request_id)
            self.block_new_requests = False
        if state is not None:  # None if it has just ended
            self._preempted[request_id] = state

    def _resume_now(self, request_id: str) -> None:
        state = self._preempted.pop(request_id, None)
        if state is not None:
            self.add_waiting_request(state)


def register_scheduler() -> str:
    """Register the scheduler with transformers; return the name to select it by."""
    SCHEDULER_MAPPING[SCHEDULER_NAME] = PreemptibleFIFOScheduler
    return SCHEDULER_NAME
