"""Isolates errors of a batch: only the requests that cause one fail.

transformers ends its thread, and every request with it, when a step raises. Here the requests of
the failed step are restored to their state before it and computed again, bisecting the batch until
the request that raises is alone; that one fails, the others get their token. A step writes the same
positions of the cache when it is computed again. Only where a window has wrapped around do the new
positions of a prompt take the places of older ones, which the step still reads: these are copied
before it, and restored. If all requests of a step raise alone, and
several did in a row including earlier steps, the requests are not the cause: none of them fails,
and the error ends the thread as it would have, so that the engine can resume them with a new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_ISOLATED_FAILURES = 3


def _ignore_device(device: torch.device, error: Exception) -> None:
    """Treat no error as a lost device."""


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """How errors of a step are classified.

    Attributes:
        fatal_errors: errors that end the thread at once; computing again would not help.
        external_errors: errors that do not count towards MAX_ISOLATED_FAILURES, because another
            thread would meet them too.
        raise_if_device_lost: called with the model's device and an error; raises one of
            `fatal_errors` if the device can no longer be used.
        on_external_error: called with a request that fails of one of `external_errors`, and it.
    """

    fatal_errors: tuple[type[Exception], ...] = ()
    external_errors: tuple[type[Exception], ...] = ()
    raise_if_device_lost: Callable[[torch.device, Exception], None] = _ignore_device
    on_external_error: Callable[[str, Exception], None] = lambda request_id, error: None


@dataclass(frozen=True, slots=True)
class _CacheSlots:
    """A copy of some slots of one layer's keys or values."""

    view: Tensor
    index: Tensor
    content: Tensor


@dataclass(frozen=True, slots=True)
class _RequestCheckpoint:
    """A request of a batch and its position before the step."""

    future: Any
    position_offset: int
    tokens: list[int]
    overwritten: tuple[_CacheSlots, ...]

    @classmethod
    def capture(cls, future: Any, cache: Any) -> _RequestCheckpoint:
        state = future.state
        overwritten = tuple(_overwritten_slots(future, cache))
        return cls(future, state.position_offset, state.tokens_to_process, overwritten)

    def restore(self) -> None:
        state = self.future.state
        state.position_offset, state.tokens_to_process = self.position_offset, self.tokens
        for slots in self.overwritten:
            slots.view[slots.index] = slots.content


def _overwritten_slots(future: Any, cache: Any) -> Iterator[_CacheSlots]:
    """Yield copies of what a step both reads and overwrites: positions that leave a window.

    A single new token takes the place of one that its own window no longer holds.
    """
    past, n_new = future.state.position_offset, future.query_length
    for allocator in cache.cache_allocators.values():
        window = getattr(allocator, "sliding_window", None)
        if window is None or not past or n_new < 2 or past + n_new <= window:
            continue
        written = allocator.get_write_indices(future.state.request_id, past, n_new)
        index = torch.tensor([i for i in written if i != allocator.write_trash_index])
        for views in allocator._kv_token_views.values():
            for view in views:  # keys and values, [slots, K, D] each
                yield _CacheSlots(view, index, view[index])


@dataclass(frozen=True, slots=True)
class _IsolatedFailure:
    """A request whose step raised although it was alone, and the error."""

    checkpoint: _RequestCheckpoint
    error: Exception


class BatchErrorIsolation:
    """Wraps the steps of one manager; created once its batch processor exists.

    Args:
        manager: transformers' ContinuousBatchingManager.
        policy: classifies errors.
    """

    def __init__(self, manager: Any, policy: ErrorPolicy) -> None:
        self._manager = manager
        self._policy = policy
        self._processor = manager.batch_processor
        self._inputs = self._processor.inputs_and_outputs
        self._prepare_batch: Callable[..., None] = self._inputs.prepare_batch_tensors
        self._run_step: Callable[[], None] = manager._generation_step
        self._run_loop_body: Callable[..., bool] = manager._generation_loop_body
        self._checkpoints: list[_RequestCheckpoint] = []
        self._prepare_kwargs: dict[str, Any] = {}
        self._n_isolated_failures = 0
        self._inputs.prepare_batch_tensors = self._checkpoint_and_prepare
        manager._generation_step = self._run_step_and_commit
        manager._generation_loop_body = self._run_loop_body_isolated

    def _checkpoint_and_prepare(self, requests_in_batch: Sequence[Any], **kwargs: Any) -> None:
        cache = self._processor.cache
        self._checkpoints = [
            _RequestCheckpoint.capture(future, cache) for future in requests_in_batch
        ]
        self._prepare_kwargs = kwargs
        self._prepare_batch(requests_in_batch=requests_in_batch, **kwargs)

    def _run_step_and_commit(self) -> None:
        self._run_step()
        self._checkpoints = []  # the requests advance from here on: the step cannot be repeated
        self._n_isolated_failures = 0

    def _run_loop_body_isolated(self, processor: Any, bootstrapping: bool) -> bool:
        self._checkpoints = []
        try:
            return self._run_loop_body(processor, bootstrapping)
        except self._policy.fatal_errors:
            raise
        except Exception as error:
            self._policy.raise_if_device_lost(self._manager.model.device, error)
            if not self._checkpoints:
                raise
            logger.exception("A batch of %d requests failed", len(self._checkpoints))
            self._fail_isolated(
                len(self._checkpoints), self._recompute_bisecting(self._checkpoints)
            )
            return True

    def _recompute_bisecting(
        self, checkpoints: Sequence[_RequestCheckpoint]
    ) -> list[_IsolatedFailure]:
        """Compute requests again, in halves while that raises; return those that raise alone."""
        for checkpoint in checkpoints:
            checkpoint.restore()
        futures = [checkpoint.future for checkpoint in checkpoints]
        n_tokens = sum(future.query_length for future in futures)
        try:
            self._prepare_batch(
                requests_in_batch=futures, **{**self._prepare_kwargs, "num_q_tokens": n_tokens}
            )
            self._run_step()
        except self._policy.fatal_errors:
            raise
        except Exception as error:
            self._policy.raise_if_device_lost(self._manager.model.device, error)
            if len(checkpoints) == 1:
                return [_IsolatedFailure(checkpoints[0], error)]
            middle = len(checkpoints) // 2
            return [
                *self._recompute_bisecting(checkpoints[:middle]),
                *self._recompute_bisecting(checkpoints[middle:]),
            ]
        self._processor.update_batch()
        return []

    def _fail_isolated(self, n_requests: int, failures: Sequence[_IsolatedFailure]) -> None:
        """Fail the requests that raised alone, unless the engine rather than they is the cause."""
        external = self._policy.external_errors
        request_errors = [f.error for f in failures if not isinstance(f.error, external)]
        if len(failures) < n_requests:
            self._n_isolated_failures = 0
        else:
            self._n_isolated_failures += len(request_errors)
        if self._n_isolated_failures >= MAX_ISOLATED_FAILURES:
            raise request_errors[-1]
        for failure in failures:
            self._fail_request(failure)

    def _fail_request(self, failure: _IsolatedFailure) -> None:
        state = failure.checkpoint.future.state
        logger.error("Request %s failed when computed alone: %r", state.request_id, failure.error)
        if isinstance(failure.error, self._policy.external_errors):
            self._policy.on_external_error(state.request_id, failure.error)
        self._processor._handle_request_error(failure.error, state)
        self._processor.scheduler.finish_request(state.request_id)
        self._processor.scheduler.block_new_requests = False
