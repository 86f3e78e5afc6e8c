"""One request from its tokens to its text: what it asks for, and its state while it runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.engine.stops import StopMatcher
from faasmoe_router.engine.text import Detokenizer
from faasmoe_router.errors import GenerationFailed
from faasmoe_router.tenants.callers import OpenTicket, Ticket

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one sequence is generated from.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_tokens: the most tokens to generate.
        sampling: how tokens are chosen.
        stops: strings that end the text and do not appear in it.
        ignore_eos: whether to go on after the model's end token.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """A step of one sequence: text that is certain now, tokens taken, and the end if it is one."""

    text: str
    n_tokens: int
    finish_reason: FinishReason | None = None


class Sequence:
    """One request that runs: tokens in, deltas out."""

    def __init__(
        self, request: GenerationRequest, *, detokenizer: Detokenizer, eos_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.n_tokens = 0
        self._detokenizer = detokenizer
        self._stops = StopMatcher(request.stops)
        self._eos_ids = frozenset() if request.ignore_eos else eos_ids

    def take(self, tokens: list[int]) -> Delta:
        """Take the tokens that were generated since the last call."""
        text = ""
        for n_taken, token in enumerate(tokens, start=1):
            self.n_tokens += 1
            if token in self._eos_ids:
                return self._end(text, n_taken, "stop")
            emitted, stopped = self._stops.feed(self._detokenizer.feed(token))
            text += emitted
            if stopped:
                return Delta(text, n_taken, "stop")
            if self.n_tokens >= self.request.max_tokens:
                return self._end(text, n_taken, "length")
        return Delta(text, len(tokens))

    def _end(self, text: str, n_taken: int, reason: FinishReason) -> Delta:
        emitted, stopped = self._stops.feed(self._detokenizer.flush())
        if stopped:
            return Delta(text + emitted, n_taken, "stop")
        return Delta(text + emitted + self._stops.flush(), n_taken, reason)


class Generation:
    """Several sequences that are read together: an async iterator of (index, delta).

    Leaving its `async with` block, or calling `cancel`, frees the sequences that still run.

    Args:
        n_sequences: how many there are.
        cancel: frees those that still run.
        ticket: hears what becomes of them.
    """

    def __init__(
        self, n_sequences: int, cancel: Callable[[], None], ticket: Ticket | None = None
    ) -> None:
        self._events: asyncio.Queue[tuple[int, Delta] | GenerationFailed] = asyncio.Queue()
        self._n_running = n_sequences
        self._cancel = cancel
        self._ticket = ticket or OpenTicket()

    def begin(self) -> None:
        """Note that the first of the sequences is computed."""
        self._ticket.started()

    def put(self, index: int, delta: Delta) -> None:
        """Add a sequence's delta."""
        self._ticket.took(delta.n_tokens, is_last=delta.finish_reason is not None)
        self._events.put_nowait((index, delta))

    def fail(self, error: GenerationFailed) -> None:
        """End the generation by an error."""
        self._ticket.failed()
        self._events.put_nowait(error)

    def cancel(self) -> None:
        """Free the sequences that still run; harmless when none does."""
        self._cancel()
        self._ticket.end()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        while self._n_running:
            event = await self._events.get()
            if isinstance(event, GenerationFailed):
                raise event
            self._n_running -= event[1].finish_reason is not None
            yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
