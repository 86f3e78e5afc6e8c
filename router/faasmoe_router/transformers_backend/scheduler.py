"""The engine's scheduler: transformers' first-in-first-out one, repaired, with some things added.

Requests can be parked: they leave the batch and its cache between two batches, and go on later from
the tokens that they have, as transformers' own do when the cache is full. What is computed for
whom is counted, batch by batch, and how much of a prompt was in the cache. And it sees, in the
engine's thread and ten times a second, whether there is any request.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

from faasmoe_router.transformers_backend.idle_reclaim import (
    IDLE_RECLAIM_DELAY_S,
    PREFIX_CACHE_RECLAIM_DELAY_S,
    IdleMemoryReclaimer,
)

SCHEDULER_NAME = "faasmoe_fifo"


class ComputedTokenCounter:
    """Tokens that were computed for each tenant; one thread writes, any takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: Counter[str] = Counter()

    def add_batch(self, batch: Sequence[tuple[str, int]]) -> None:
        """Count a batch: request ids and how many tokens of each are computed."""
        with self._lock:
            for request_id, n_tokens in batch:
                self._tokens[request_tenant(request_id)] += n_tokens

    def drain(self) -> Mapping[str, int]:
        """Return what was counted since the last call."""
        with self._lock:
            drained, self._tokens = self._tokens, Counter()
        return drained


class PreemptibleFIFOScheduler(FIFOScheduler):  # type: ignore[misc]
    """Computes what it is given; which that is, and in which order, is decided ahead of it.

    When the cache is full, transformers admits nothing until a running request finishes. If all
    running requests are cancelled or parked instead, what waits would wait for ever.

    Attributes:
        computed: where batches are counted.
        memory: gives back what requests took, once there has been none for a while.
    """

    def __init__(self, cache: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cache, *args, **kwargs)
        self.computed_tokens = ComputedTokenCounter()
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

    def preempt(self, request_id: str) -> None:
        """Take a request out of the batches from the next one on; from any thread."""
        self._pending_actions.append(("preempt", request_id))

    def resume(self, request_id: str) -> None:
        """Let a parked request wait for a batch again; from any thread."""
        self._pending_actions.append(("resume", request_id))

    def clear_cancelled_requests(self) -> list[Any]:
        """Do what was wished, remove the cancelled requests; return their states."""
        while self._pending_actions:
            action, request_id = self._pending_actions.popleft()
            self._preempt_now(request_id) if action == "preempt" else self._resume_now(request_id)
        for request_id in list(self._requests_to_cancel):
            self._resume_now(request_id)
        cancelled: list[Any] = super().clear_cancelled_requests()
        self.pop_cached_tokens(state.request_id for state in cancelled)
        if cancelled:
            self.block_new_requests = False
        self.idle_reclaimer.observe(time.monotonic(), is_idle=not self.has_pending_requests())
        return cancelled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, ...]:
        """Schedule the next batch, and count it."""
        scheduled: tuple[Any, ...] = super().schedule_batch(token_budget, cache_budget)
        batch = scheduled[0] or ()
        self.computed_tokens.add_batch(
            [(each.state.request_id, each.query_length) for each in batch]
        )
        return scheduled

    def pop_cached_tokens(self, request_ids: Iterable[str]) -> Mapping[str, int]:
        """Return how many tokens of these requests' prompts were in the cache, each once."""
        return {
            name: self._n_cached_tokens.pop(name)
            for name in request_ids
            if name in self._n_cached_tokens
        }

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
            active._status = RequestStatus.FINISHED  # not by its setter, which logs an end
            self.finish_request(request_id)
            self.block_new_requests = False
        if state is not None:  # else it has just ended
            self._preempted[request_id] = state

    def _resume_now(self, request_id: str) -> None:
        state = self._preempted.pop(request_id, None)
        if state is not None:
            self.add_waiting_request(state)


def make_request_id(tenant: str, number: int) -> str:
    """Return the id of a tenant's request."""
    return f"{tenant}/{number}"


def request_tenant(request_id: str) -> str:
    """Return whose request this is."""
    return request_id.rpartition("/")[0]


def register_scheduler() -> str:
    """Make the scheduler known to transformers; return its name there."""
    SCHEDULER_MAPPING[SCHEDULER_NAME] = PreemptibleFIFOScheduler
    return SCHEDULER_NAME
