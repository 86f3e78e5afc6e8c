"""A batch that raises costs only the requests that it raises for.

transformers ends its thread, and every request with it, when a step raises. Here the step's
requests are put back to where they stood before it and computed again by halves, until the one that
raises is alone; it fails, the others have their token. Computing a step again is harmless: it
writes the same places of the cache. When several requests in a row fail though they are alone, and
none succeeds in between, it is not they: the error goes on, and ends the thread as it would have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_router.errors import StoreUnreadable

logger = logging.getLogger(__name__)

MAX_LONE_FAILURES = 3


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
        except StoreUnreadable:
            raise
        except Exception as error:
            if not self._places:
                raise
            logger.exception("A batch of %d requests failed", len(self._places))
            self._divide(self._places, error)
            return True

    def _divide(self, places: Sequence[_Place], error: Exception) -> None:
        """Compute a batch that raised again by halves; the request that raises alone fails."""
        if len(places) == 1:
            self._fail(places[0], error)
            return
        middle = len(places) // 2
        for half in (places[:middle], places[middle:]):
            self._compute(half)

    def _compute(self, places: Sequence[_Place]) -> None:
        for place in places:
            place.restore()
        futures = [place.future for place in places]
        n_tokens = sum(future.query_length for future in futures)
        try:
            self._prepare(requests_in_batch=futures, **{**self._options, "num_q_tokens": n_tokens})
            self._step()
        except StoreUnreadable:
            raise
        except Exception as error:
            self._divide(places, error)
            return
        self._n_lone_failures = 0
        self._processor.update_batch()

    def _fail(self, place: _Place, error: Exception) -> None:
        self._n_lone_failures += 1
        if self._n_lone_failures >= MAX_LONE_FAILURES:
            raise error
        state = place.future.state
        logger.error("Request %s fails alone: %r", state.request_id, error)
        self._processor._handle_request_error(error, state)
        self._processor.scheduler.finish_request(state.request_id)
        self._processor.scheduler.block_new_requests = False
