"""Generation requests and the stream of their outputs.

A `GenerationRequest` describes one sequence: prompt tokens, sampling parameters and stop
conditions. A `Generation` streams the outputs of the sequences of one API request to its reader and
reports their usage. Nothing here knows how sequences are scheduled or computed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self

from faasmoe_router.engine.journal import Progress
from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties, SampledLogprob
from faasmoe_router.engine.structured_output import CompiledGrammar
from faasmoe_router.errors import GenerationFailed
from faasmoe_tracing import NO_SPAN, Span

FinishReason = Literal["stop", "length"]
StopReason = str | int


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a sequence ends, other than by its length.

    Attributes:
        stop_strings: strings that end the text.
        stop_token_ids: tokens that end the text, in addition to the model's EOS tokens.
        ignore_eos: whether generation continues after the model's EOS tokens.
        min_tokens: number of tokens before which no stop condition applies.
        include_stop: whether the text includes the stop string or stop token that ended it.
    """

    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop: bool = False

    def all_stop_token_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return all token ids that end the text, given the model's EOS tokens."""
        return (*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids)


@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """The tokens around the reasoning at the start of a text.

    Attributes:
        start: token that opens reasoning.
        end: token that closes it.
        is_open: whether the prompt has opened it.
    """

    start: int
    end: int
    is_open: bool


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a sequence are selected.

    Attributes:
        draw: temperature, truncation and seed.
        penalties: repetition, presence and frequency penalties.
        logit_bias: biased, allowed and forbidden tokens.
        n_logprobs: number of top log-probabilities reported with each token; None reports none, 0
            only the sampled token's.
        logprob_token_ids: tokens whose log-probabilities are reported instead of the top ones.
        grammar: grammar that constrains the text; None for unconstrained text.
        reasoning: tokens of the reasoning that may precede the text that the grammar constrains;
            None if it constrains the text from its first token.
    """

    draw: DrawParams = field(default_factory=DrawParams)
    penalties: Penalties = field(default_factory=Penalties)
    logit_bias: LogitBias = field(default_factory=LogitBias)
    n_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    grammar: CompiledGrammar | None = None
    reasoning: ReasoningTokens | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether sampling is the argmax of the unmodified scores, without log-probabilities."""
        return (
            self.draw.is_greedy
            and self.penalties.is_neutral
            and self.logit_bias.is_neutral
            and self.n_logprobs is None
            and self.grammar is None
        )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        prompt_token_ids: tokens of the prompt.
        max_tokens: maximum number of tokens to generate.
        sampling_params: how tokens are selected.
        stop_conditions: what ends the sequence before `max_tokens`.
        include_special_tokens: whether special tokens appear in the text.
        scores_prompt: whether the log-probabilities of the prompt's tokens are reported, for which
            the sequence starts at its first token and is given the others one by one.
        priority: position among the waiting sequences of its tenant; lower runs earlier.
        cache_salt: shares cached prefixes only with requests of the same salt; None adds no salt.
        scores_stop: whether log-probabilities include those of the tokens that ended the text, as
            token IDs do.
    """

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop_conditions: StopConditions = field(default_factory=StopConditions)
    include_special_tokens: bool = False
    scores_prompt: bool = False
    priority: int = 0
    cache_salt: str | None = None
    scores_stop: bool = False

    @property
    def n_given(self) -> int:
        """Number of prompt tokens that the sequence starts with."""
        return 1 if self.scores_prompt else len(self.prompt_token_ids)

    @property
    def n_forced(self) -> int:
        """Number of prompt tokens that it is given one by one."""
        return len(self.prompt_token_ids) - self.n_given

    @property
    def ends_by_token(self) -> bool:
        """Whether its end is that of its tokens, not of its text, and nothing is kept by token."""
        sampling = self.sampling_params
        is_plain = sampling.grammar is None and sampling.n_logprobs is None
        return is_plain and not (self.stop_conditions.stop_strings or self.scores_prompt)

    @property
    def n_sampled(self) -> int:
        """Number of tokens that the engine computes for it; at least one, even if none is kept."""
        return max(1, self.n_forced + self.max_tokens)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """New output of one sequence since the previous `CompletionOutput`.

    Attributes:
        text: new text; excludes what may still turn out to be part of a stop string.
        n_tokens: number of tokens processed.
        finish_reason: why the sequence ended; None while it runs.
        logprobs: (offset, log-probability) of each token whose text starts within `text`; the
            offset counts characters from the start of the sequence's text.
        stop_reason: the request's stop string or stop token that ended the sequence, if one did.
        n_cached_tokens: prompt tokens found in the prefix cache; set on the first output only.
        n_cache_written_tokens: prompt tokens that later prompts can find there because of this one;
            with the first output only.
        token_ids: the tokens processed.
        prompt_logprobs: log-probabilities of the prompt's next tokens, if requested; the first
            token of a prompt has none.
        progress: the tokens behind it, to repeat it elsewhere.
    """

    text: str
    n_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[tuple[int, SampledLogprob], ...] = ()
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None
    n_cache_written_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[SampledLogprob, ...] = ()
    progress: Progress = field(default=Progress(()), compare=False)


class UsageRecorder(Protocol):
    """Records what one API request uses."""

    def record_started(self) -> None:
        """Record that a sequence was submitted for computation; may be called several times."""

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Record generated tokens of one sequence; `is_last` marks its end."""

    def record_failure(self) -> None:
        """Record that the request cannot be finished, through no fault of its own."""

    def finish(self) -> None:
        """Finalize the record; idempotent."""


class NullUsageRecorder:
    """Records nothing."""

    def record_started(self) -> None:
        """Do nothing."""

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Do nothing."""

    def record_failure(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Generation:
    """The output stream of one API request: an async iterator of (sequence index, output).

    Iteration ends when every sequence has finished and raises GenerationFailed when one fails.
    Leaving the `async with` block, or calling `cancel`, aborts the sequences that still run.

    Args:
        n_sequences: number of sequences.
        on_cancel: aborts the sequences that still run.
        usage_recorder: records usage and outcome; None records nothing.
        span: traces it.

    Attributes:
        span: traces it; ended with it.
    """

    def __init__(
        self,
        n_sequences: int,
        on_cancel: Callable[[], None],
        usage_recorder: UsageRecorder | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        self._outputs: asyncio.Queue[tuple[int, CompletionOutput] | GenerationFailed] = (
            asyncio.Queue()
        )
        self._n_running = n_sequences
        self._on_cancel = on_cancel
        self._usage_recorder = usage_recorder or NullUsageRecorder()
        self._n_tokens = 0
        self._finish_reasons: list[str] = []
        self.span = span

    def mark_started(self) -> None:
        """Record that a sequence was submitted for computation."""
        self._usage_recorder.record_started()

    def put_output(self, index: int, output: CompletionOutput) -> None:
        """Append an output of the sequence at `index`."""
        self._usage_recorder.record_tokens(
            output.n_tokens, is_last=output.finish_reason is not None
        )
        self._n_tokens += output.n_tokens
        if output.finish_reason is not None:
            self._finish_reasons.append(output.finish_reason)
        self._outputs.put_nowait((index, output))

    def fail(self, error: GenerationFailed) -> None:
        """End the stream with an error, which its reader receives."""
        self._usage_recorder.record_failure()
        self.span.fail(type(error).__name__)
        self._outputs.put_nowait(error)

    def cancel(self) -> None:
        """Abort the sequences that still run and finalize the usage record; idempotent."""
        self._on_cancel()
        self._usage_recorder.finish()
        if self.span.is_recorded:
            self.span.set({"gen_ai.usage.output_tokens": self._n_tokens})
            self.span.set({"gen_ai.response.finish_reasons": self._finish_reasons})
        self.span.end()

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
