"""What ends a text, besides its length.

How one request's tokens are chosen.

What a sequence is generated from, and what is read of it while it runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties, SampledLogprob
from faasmoe_router.engine.structured_output import CompiledGrammar
from faasmoe_router.errors import GenerationFailed
from faasmoe_router.tenants.caller import NullUsageRecorder, UsageRecorder

FinishReason = Literal["stop", "length"]
StopReason = str | int


@dataclass(frozen=True, slots=True)
class StopConditions:
    """What a request lets end its text.

    Attributes:
        stops: strings that end the text.
        stop_ids: tokens that end the text, besides the model's own end tokens.
        ignore_eos: whether to go on after the model's end tokens.
        min_tokens: the tokens before which nothing ends the text.
        included: whether the stop string, or the token, that ends the text is in it.
    """

    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop: bool = False

    def all_stop_token_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens that end the text, of a model with these end tokens."""
        return (*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Attributes:
        sampling: the draw.
        penalties: what repetition costs.
        bias: which tokens are favoured or forbidden.
        n_logprobs: how many of the likeliest tokens are told with each token; None tells nothing.
        grammar: what the text is held to.
    """

    draw: DrawParams = field(default_factory=DrawParams)
    penalties: Penalties = field(default_factory=Penalties)
    logit_bias: LogitBias = field(default_factory=LogitBias)
    n_logprobs: int | None = None
    grammar: CompiledGrammar | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the highest of the model's own scores is chosen and nothing is told of it."""
        return (
            self.draw.is_greedy
            and self.penalties.is_neutral
            and self.logit_bias.is_neutral
            and self.n_logprobs is None
            and self.grammar is None
        )


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

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop_conditions: StopConditions = field(default_factory=StopConditions)
    include_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class CompletionOutput:
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
    logprobs: tuple[tuple[int, SampledLogprob], ...] = ()
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
        self,
        n_sequences: int,
        on_cancel: Callable[[], None],
        usage_recorder: UsageRecorder | None = None,
    ) -> None:
        self._outputs: asyncio.Queue[tuple[int, CompletionOutput] | GenerationFailed] = (
            asyncio.Queue()
        )
        self._n_running = n_sequences
        self._on_cancel = on_cancel
        self._usage_recorder = usage_recorder or NullUsageRecorder()

    def mark_started(self) -> None:
        """Note that the first of the sequences is computed."""
        self._usage_recorder.record_started()

    def put_output(self, index: int, output: CompletionOutput) -> None:
        """Add a sequence's delta."""
        self._usage_recorder.record_tokens(
            output.n_tokens, is_last=output.finish_reason is not None
        )
        self._outputs.put_nowait((index, output))

    def fail(self, error: GenerationFailed) -> None:
        """End the generation by an error."""
        self._usage_recorder.record_failure()
        self._outputs.put_nowait(error)

    def cancel(self) -> None:
        """Free the sequences that still run; harmless when none does."""
        self._on_cancel()
        self._usage_recorder.finish()

    async def __aiter__(self) -> AsyncIterator[tuple[int, CompletionOutput]]:
        while self._n_running:
            event = await self._outputs.get()
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
