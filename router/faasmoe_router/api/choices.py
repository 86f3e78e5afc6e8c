"""The choices of a response: what has been generated of each, and how they are written.

How choices look is up to a `ChoiceFormatter`: chat completions have messages, tool calls and
OpenAI's current form of log-probabilities (`chat_choices`), text completions have plain text and
the legacy form (`completion_choices`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.engine.generation import CompletionOutput, StopReason
from faasmoe_router.engine.sampler import SampledLogprob


@dataclass(slots=True)
class ChoiceState:
    """The accumulated output of one choice.

    Attributes:
        text: the text so far; stays empty in a stream.
        n_tokens: the number of generated tokens.
        finish_reason: why the choice ended; None while it runs, and in a stream.
        stop_reason: the stop string or stop token that ended it, if one did.
        n_cached_tokens: prompt tokens found in the prefix cache; None until known.
        n_cache_written_tokens: prompt tokens that the prefix cache has gained.
        logprobs: the log-probabilities of its tokens, if requested; stays empty in a stream.
        token_ids: its tokens; stays empty in a stream.
        prompt_logprobs: the log-probabilities of its prompt's tokens but the first, if requested.
    """

    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None
    n_cache_written_tokens: int = 0
    logprobs: list[tuple[int, SampledLogprob]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[SampledLogprob] = field(default_factory=list)

    def add(self, output: CompletionOutput) -> None:
        """Append new output."""
        self.add_counts(output)
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.logprobs += output.logprobs
        self.token_ids += output.token_ids
        self.prompt_logprobs += output.prompt_logprobs

    def add_counts(self, output: CompletionOutput) -> None:
        """Add the token counts of new output only."""
        self.n_tokens += output.n_tokens
        self.n_cache_written_tokens += output.n_cache_written_tokens
        if output.n_cached_tokens is not None:
            self.n_cached_tokens = output.n_cached_tokens


def with_finish_reason(
    entry: Mapping[str, Any], finish_reason: str | None, stop_reason: StopReason | None
) -> dict[str, Any]:
    """Return an entry of `choices` with why the choice ended."""
    return {**entry, "finish_reason": finish_reason, "stop_reason": stop_reason}


class ChoiceFormatter(Protocol):
    """Formats the choices of one kind of completion."""

    id_prefix: str
    object_type: str
    chunk_object_type: str

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return the entry of a finished choice in `choices`."""

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return a choice's entry in its first chunk, before any output; None if there is none."""

    def format_chunks(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's entries for new output, one per chunk.

        The last entry of a choice has its finish reason. As in vLLM it has content too if the last
        token has any.
        """

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return a choice's entry without any output."""

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return how many tokens of new output are reasoning; to be called once per output."""
