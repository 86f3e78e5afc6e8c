"""A batch that raises costs only the requests that it raises for.

transformers ends its thread, and every request with it, when a step raises. Here the step's
requests are put back to where they stood before it and computed again, by halves if need be, until
the one that raises is alone; it fails, the others have their token. Computing a step again is
harmless: it writes the same places of the cache. When all of a step's requests raise alone, and
they are several in a row with those before them, it is not they: none of them fails, the error goes
on, and ends the thread as it would have; the engine gives them to another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_expert.device import device_lost_reason
from faasmoe_router.errors import EngineDeviceLost, StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

MAX_ISOLATED_FAILURES = 3

FATAL_ERRORS = (StoreUnreadable, EngineDeviceLost)
"""What another engine in this process would meet again."""


@dataclass(frozen=True, slots=True)
class _RequestCheckpoint:
    """A request of a batch, and where it stood before the step."""

    future: Any
    position_offset: int
    tokens: list[int]

    @classmethod
    def capture(cls, future: Any) -> _RequestCheckpoint:
        state = future.state
        return cls(future, state.position_offset, state.tokens_to_process)

    def restore(self) -> None:
        state = self.future.state
        state.position_offset, state.tokens_to_process = self.position_offset, self.tokens


@dataclass(frozen=True, slots=True)
class _IsolatedFailure:
    """A request whose step raised though it was alone, and what it raised."""

    checkpoint: _RequestCheckpoint
    error: Exception


class BatchErrorIsolation:
    """Guards the steps of one manager; made once its batch processor is there.

    Args:
        manager: transformers' ContinuousBatchingManager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
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
        self._checkpoints = [_RequestCheckpoint.capture(future) for future in requests_in_batch]
        self._prepare_kwargs = kwargs
        self._prepare_batch(requests_in_batch=requests_in_batch, **kwargs)

    def _run_step_and_commit(self) -> None:
        self._run_step()
        self._checkpoints = []  # from here on the requests move on: nothing can be done again
        self._n_isolated_failures = 0

    def _run_loop_body_isolated(self, processor: Any, bootstrapping: bool) -> bool:
        self._checkpoints = []
        try:
            return self._run_loop_body(processor, bootstrapping)
        except FATAL_ERRORS:
            raise
        except Exception as error:
            self._raise_if_device_lost(error)
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
        """Compute requests again, and by halves if that raises; return those that raise alone."""
        for place in checkpoints:
            place.restore()
        futures = [place.future for place in checkpoints]
        n_tokens = sum(future.query_length for future in futures)
        try:
            self._prepare_batch(
                requests_in_batch=futures, **{**self._prepare_kwargs, "num_q_tokens": n_tokens}
            )
            self._run_step()
        except FATAL_ERRORS:
            raise
        except Exception as error:
            self._raise_if_device_lost(error)
            if len(checkpoints) == 1:
                return [_IsolatedFailure(checkpoints[0], error)]
            middle = len(checkpoints) // 2
            return [
                *self._recompute_bisecting(checkpoints[:middle]),
                *self._recompute_bisecting(checkpoints[middle:]),
            ]
        self._processor.update_batch()
        return []

    def _raise_if_device_lost(self, error: Exception) -> None:
        """Raise DeviceLost if an error has ended the device: nothing can be computed again."""
        if (why := device_lost_reason(self._manager.model.device)) is not None:
            raise EngineDeviceLost(
                f"the device {self._manager.model.device} is lost: {why}"
            ) from error

    def _fail_isolated(self, n_requests: int, failures: Sequence[_IsolatedFailure]) -> None:
        """Fail those that raised alone, unless it is not they."""
        # Damaged bytes are the store's fault: another engine would find the same.
        request_errors = [f.error for f in failures if not isinstance(f.error, StoreCorrupted)]
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
        self._processor._handle_request_error(failure.error, state)
        self._processor.scheduler.finish_request(state.request_id)
        self._processor.scheduler.block_new_requests = False
