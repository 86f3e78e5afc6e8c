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

from faasmoe_expert.device import why_lost
from faasmoe_router.errors import DeviceLost, StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

MAX_LONE_FAILURES = 3

FINAL = (StoreUnreadable, DeviceLost)
"""What another engine in this process would meet again."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A request of a batch, and where it stood before the step."""

    future: Any
    position_offset: int
    tokens: list[int]

    @classmethod
    def of(cls, future: Any) -> _Place:
        state = future.state
        return cls(future, state.position_offset, state.tokens_to_process)

    def restore(self) -> None:
        state = self.future.state
        state.position_offset, state.tokens_to_process = self.position_offset, self.tokens


@dataclass(frozen=True, slots=True)
class _LoneFailure:
    """A request whose step raised though it was alone, and what it raised."""

    place: _Place
    error: Exception


class Isolation:
    """Guards the steps of one manager; made once its batch processor is there.

    Args:
        manager: transformers' ContinuousBatchingManager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._processor = manager.batch_processor
        self._inputs = self._processor.inputs_and_outputs
        self._prepare: Callable[..., None] = self._inputs.prepare_batch_tensors
        self._step: Callable[[], None] = manager._generation_step
        self._body: Callable[..., bool] = manager._generation_loop_body
        self._places: list[_Place] = []
        self._options: dict[str, Any] = {}
        self._n_lone_failures = 0
        self._inputs.prepare_batch_tensors = self._note_and_prepare
        manager._generation_step = self._note_step
        manager._generation_loop_body = self._guarded_body

    def _note_and_prepare(self, requests_in_batch: Sequence[Any], **options: Any) -> None:
        self._places = [_Place.of(future) for future in requests_in_batch]
        self._options = options
        self._prepare(requests_in_batch=requests_in_batch, **options)

    def _note_step(self) -> None:
        self._step()
        self._places = []  # from here on the requests move on: nothing can be done again
        self._n_lone_failures = 0

    def _guarded_body(self, processor: Any, bootstrapping: bool) -> bool:
        self._places = []
        try:
            return self._body(processor, bootstrapping)
        except FINAL:
            raise
        except Exception as error:
            self._refuse_lost(error)
            if not self._places:
                raise
            logger.exception("A batch of %d requests failed", len(self._places))
            self._settle(len(self._places), self._compute(self._places))
            return True

    def _compute(self, places: Sequence[_Place]) -> list[_LoneFailure]:
        """Compute requests again, and by halves if that raises; return those that raise alone."""
        for place in places:
            place.restore()
        futures = [place.future for place in places]
        n_tokens = sum(future.query_length for future in futures)
        try:
            self._prepare(requests_in_batch=futures, **{**self._options, "num_q_tokens": n_tokens})
            self._step()
        except FINAL:
            raise
        except Exception as error:
            self._refuse_lost(error)
            if len(places) == 1:
                return [_LoneFailure(places[0], error)]
            middle = len(places) // 2
            return [*self._compute(places[:middle]), *self._compute(places[middle:])]
        self._processor.update_batch()
        return []

    def _refuse_lost(self, error: Exception) -> None:
        """Raise DeviceLost if an error has ended the device: nothing can be computed again."""
        if (why := why_lost(self._manager.model.device)) is not None:
            raise DeviceLost(f"the device {self._manager.model.device} is lost: {why}") from error

    def _settle(self, n_requests: int, failures: Sequence[_LoneFailure]) -> None:
        """Fail those that raised alone, unless it is not they."""
        # Damaged bytes are the store's fault: another engine would find the same.
        faults = [f.error for f in failures if not isinstance(f.error, StoreCorrupted)]
        if len(failures) < n_requests:
            self._n_lone_failures = 0
        else:
            self._n_lone_failures += len(faults)
        if self._n_lone_failures >= MAX_LONE_FAILURES:
            raise faults[-1]
        for failure in failures:
            self._fail(failure)

    def _fail(self, failure: _LoneFailure) -> None:
        state = failure.place.future.state
        logger.error("Request %s fails alone: %r", state.request_id, failure.error)
        self._processor._handle_request_error(failure.error, state)
        self._processor.scheduler.finish_request(state.request_id)
        self._processor.scheduler.block_new_requests = False
