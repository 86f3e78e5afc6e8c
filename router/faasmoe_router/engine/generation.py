"""What a sequence is generated from, and what is read of it while it runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from faasmoe_router.engine.choosing import Choosing
from faasmoe_router.engine.ending import Ending, FinishReason, StopReason
from faasmoe_router.engine.logprobs import TokenLogprob
from faasmoe_router.errors import GenerationFailed
from faasmoe_router.tenants.callers import OpenTicket, Ticket


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one sequence is generated from.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_tokens: the most tokens to generate.
        choosing: how tokens are chosen.
        ending: what ends the text before that.
        special: whether special tokens are told as text.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    choosing: Choosing = field(default_factory=Choosing)
    ending: Ending = field(default_factory=Ending)
    special: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """A step of one sequence: text that is certain now, tokens taken, and the end if it is one.

    Attributes:
        text: the text.
        n_tokens: how many tokens were taken.
        finish_reason: why the sequence ended, if it did.
        stop_reason: the stop string, or the stop token of the request's own, that ended it, if one
            of them did.
        n_cached_tokens: tokens of the prompt that were in the cache; told with the first token.
        logprobs: the log-probabilities of the tokens whose text begins in this text, each after
            the character of the sequence's text at which it begins.
    """

    text: str
    n_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None


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
