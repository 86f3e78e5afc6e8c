"""Response bodies of chat completions and text completions, whole or as stream chunks.

A `ResponseBuilder` reads one generation and adds ids, usage and metadata to its choices, which a
`ChoiceFormatter` writes. Nothing here does I/O.
"""

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from faasmoe_router.api.choices import ChoiceFormatter, ChoiceState
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.protocol import StreamOptions
from faasmoe_router.api.token_details import TokenDetails
from faasmoe_router.engine.generation import CompletionOutput, Generation

_COMPLETION_TOKENS_DETAILS = {  # there is no speculative prediction
    "accepted_prediction_tokens": 0,
    "audio_tokens": 0,
    "reasoning_tokens": 0,
    "rejected_prediction_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class ResponseMeta:
    """Fields that the whole response, or each chunk of a stream, starts with.

    Attributes:
        id_prefix: the start of the response id, such as `chatcmpl`.
        model: the model name as in the request.
        extra_fields: additional fields, such as `system_fingerprint`.
        id: the rest of the response id.
        created_s: the time of the response in seconds since the epoch.
    """

    id_prefix: str
    model: str
    extra_fields: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    created_s: int = 0

    @classmethod
    def from_origin(
        cls, id_prefix: str, model: str, origin: Origin, extra_fields: Mapping[str, Any]
    ) -> Self:
        """Return the fields of a response with an origin."""
        return cls(id_prefix, model, extra_fields, origin.hex_id("response"), origin.created_s)

    def to_fields(self, object_type: str) -> dict[str, Any]:
        """Return the fields of an object of this type, such as `chat.completion.chunk`."""
        return {
            "id": f"{self.id_prefix}-{self.id}",
            "object": object_type,
            "created": self.created_s,
            "model": self.model,
            **self.extra_fields,
        }


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """The sizes of a request that its usage depends on.

    Attributes:
        n_prompt_tokens: tokens of all prompts, each counted once.
        n_choices: choices of all prompts.
        n_choices_per_prompt: choices of each prompt.
    """

    n_prompt_tokens: int
    n_choices: int
    n_choices_per_prompt: int


class ResponseBuilder:
    """Builds the response of one generation, either whole or as stream chunks; use it once.

    Args:
        formatter: formats the choices.
        meta: fields of the response.
        counts: sizes of the request.
        token_details: what the request asks to know of tokens.
    """

    def __init__(
        self,
        formatter: ChoiceFormatter,
        meta: ResponseMeta,
        counts: RequestCounts,
        token_details: TokenDetails | None = None,
    ) -> None:
        self._token_details = token_details or TokenDetails()
        self._formatter = formatter
        self._meta = meta
        self._counts = counts
        self._choices = [ChoiceState() for _ in range(counts.n_choices)]
        self._n_reasoning = 0

    async def full_response(self, generation: Generation) -> dict[str, Any]:
        """Read the generation to its end and return the response body."""
        async with generation:
            async for index, output in generation:
                self._choices[index].add(output)
                self._n_reasoning += self._formatter.count_reasoning_tokens(index, output)
        choices = [
            {**self._formatter.format_choice(i, choice), **self._choice_fields(i, choice)}
            for i, choice in enumerate(self._choices)
        ]
        return {
            **self._meta.to_fields(self._formatter.object_type),
            "choices": choices,
            "usage": self._usage(),
            **self._token_details.response_fields(self._choices[0].prompt_logprobs),
        }

    def _choice_fields(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        return self._token_details.choice_fields(index, choice.token_ids, choice.prompt_logprobs)

    async def stream_chunks(
        self,
        generation: AsyncIterable[tuple[int, CompletionOutput]],
        options: StreamOptions,
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed response while the generation runs."""
        chunk_fields = self._meta.to_fields(self._formatter.chunk_object_type)
        for index in range(len(self._choices)):
            first_chunk = self._formatter.first_chunk(index)
            prompt_fields = self._token_details.first_chunk_fields(index)
            if first_chunk is None and prompt_fields:
                first_chunk = self._formatter.empty_chunk(index)
            if first_chunk is not None:
                choice = {**first_chunk, **prompt_fields}
                yield {**chunk_fields, "choices": [choice], **self._chunk_usage(options)}
        async for index, output in generation:
            self._choices[index].add_counts(output)
            self._n_reasoning += self._formatter.count_reasoning_tokens(index, output)
            chunks = self._formatter.format_chunks(index, output)
            token_fields = self._token_details.chunk_fields(output.token_ids)
            if output.token_ids and token_fields and not chunks:
                chunks = [self._formatter.empty_chunk(index)]
            for chunk in chunks:
                choice = {**chunk, **token_fields}
                token_fields = self._token_details.chunk_fields(())
                yield {**chunk_fields, "choices": [choice], **self._chunk_usage(options)}
        if options.include_usage:
            yield {**chunk_fields, "choices": [], "usage": self._usage()}

    def _chunk_usage(self, options: StreamOptions) -> dict[str, Any]:
        if not options.include_usage:
            return {}
        return {"usage": self._usage() if options.continuous_usage_stats else None}

    def _usage(self) -> dict[str, Any]:
        n_prompt = self._counts.n_prompt_tokens
        n_completion = sum(choice.n_tokens for choice in self._choices)
        n_cached, n_written = self._n_cached_tokens(), self._n_cache_written_tokens()
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
            "prompt_tokens_details": (
                None if n_cached is None else _prompt_details(n_cached, n_written)
            ),
            "completion_tokens_details": {
                **_COMPLETION_TOKENS_DETAILS,
                "reasoning_tokens": self._n_reasoning,
            },
        }

    def _n_cached_tokens(self) -> int | None:
        """Return the prompt tokens found in the prefix cache; None until known for all choices.

        Later choices of a prompt also hit what the first one has just cached, so the minimum over
        the choices of a prompt is what was cached before the request.
        """
        cached_per_choice = [choice.n_cached_tokens for choice in self._choices]
        known = [n for n in cached_per_choice if n is not None]
        if len(known) < len(cached_per_choice):
            return None
        return sum(map(min, self._by_prompt(known)))

    def _n_cache_written_tokens(self) -> int:
        """Return the prompt tokens that the prefix cache has gained.

        Choices of a prompt that run at once write the same ones.
        """
        written_per_choice = [choice.n_cache_written_tokens for choice in self._choices]
        return sum(map(max, self._by_prompt(written_per_choice)))

    def _by_prompt(self, counts: Sequence[int]) -> list[Sequence[int]]:
        """Return the counts of each prompt's choices."""
        n_each = self._counts.n_choices_per_prompt
        return [counts[i : i + n_each] for i in range(0, len(counts), n_each)]


def _prompt_details(n_cached: int, n_written: int) -> dict[str, int]:
    return {"audio_tokens": 0, "cached_tokens": n_cached, "cache_write_tokens": n_written}
