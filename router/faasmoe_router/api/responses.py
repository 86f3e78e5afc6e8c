"""Response bodies of chat completions and text completions, whole or as stream chunks.

A `ResponseBuilder` reads one generation and adds ids, usage and metadata. How choices look is up to
its `ChoiceFormatter`: chat completions have messages, tool calls and OpenAI's current form of
log-probabilities, text completions have plain text and the legacy form. Nothing here does I/O.
"""

import json
import string
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from faasmoe_router.api.origin import Origin
from faasmoe_router.api.protocol import StreamOptions
from faasmoe_router.api.reasoning import MessageFormat
from faasmoe_router.api.token_details import (
    TokenBytes,
    TokenDetails,
    TokenName,
    legacy_token_name,
    text_offsets,
    token_id_name,
)
from faasmoe_router.api.tool_params import CUSTOM_TOOL_INPUT
from faasmoe_router.engine.generation import CompletionOutput, Generation, StopReason
from faasmoe_router.engine.sampler import SampledLogprob
from faasmoe_router.toolcalls.message import AnyMessageParser, MessageEvent
from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallArgumentsDelta, ToolCallStart
from faasmoe_router.toolcalls.reasoning import ReasoningDelta

OffsetLogprobs = Sequence[tuple[int, SampledLogprob]]
"""Log-probabilities of tokens, each with the offset in characters of its text in the choice."""

_CALL_ID_CHARACTERS = string.ascii_letters + string.digits
_COMPLETION_TOKENS_DETAILS = {  # there is no speculative prediction
    "accepted_prediction_tokens": 0,
    "audio_tokens": 0,
    "reasoning_tokens": 0,
    "rejected_prediction_tokens": 0,
}


def to_chat_logprobs(
    token_logprobs: OffsetLogprobs,
    token_bytes: TokenBytes,
    *,
    n_top: int | None = None,
    as_ids: bool = False,
) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice, or of one chunk of it.

    Args:
        token_logprobs: the log-probabilities of each token.
        token_bytes: returns the bytes that a token stands for.
        n_top: candidates per token; None for all that were computed.
        as_ids: whether tokens are named by their IDs.
    """

    def token_entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_bytes(token)
        return {
            "token": token_id_name(token) if as_ids else text.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(text),
        }

    token_entries = [
        {
            **token_entry(sampled.token, sampled.logprob),
            "top_logprobs": [token_entry(*candidate) for candidate in sampled.top_logprobs[:n_top]],
        }
        for _, sampled in token_logprobs
    ]
    return {"content": token_entries, "refusal": None}


def to_completion_logprobs(
    token_logprobs: OffsetLogprobs,
    token_name: TokenName,
    *,
    first_text_offset: int,
    n_top: int | None = None,
) -> dict[str, Any]:
    """Return the `logprobs` of a text choice, or of one chunk of it, in OpenAI's legacy form.

    Args:
        token_logprobs: the log-probabilities of each token.
        token_name: returns how a token is written.
        first_text_offset: characters of the choice before its generated text (an echoed prompt).
        n_top: candidates per token; None for all that were computed.
    """

    def top_logprobs(sampled: SampledLogprob) -> dict[str, float]:
        # Reversed: if two tokens have the same text, the likelier one wins.
        return {
            token_name(token): logprob
            for token, logprob in reversed(
                [*sampled.top_logprobs[:n_top], (sampled.token, sampled.logprob)]
            )
        }

    return {
        "tokens": [token_name(sampled.token) for _, sampled in token_logprobs],
        "token_logprobs": [sampled.logprob for _, sampled in token_logprobs],
        "top_logprobs": [top_logprobs(sampled) for _, sampled in token_logprobs],
        "text_offset": [first_text_offset + offset for offset, _ in token_logprobs],
    }


@dataclass(slots=True)
class ChoiceState:
    """The accumulated output of one choice.

    Attributes:
        text: the text so far; stays empty in a stream.
        n_tokens: the number of generated tokens.
        finish_reason: why the choice ended; None while it runs, and in a stream.
        stop_reason: the stop string or stop token that ended it, if one did.
        n_cached_tokens: prompt tokens found in the prefix cache; None until known.
        logprobs: the log-probabilities of its tokens, if requested; stays empty in a stream.
        token_ids: its tokens; stays empty in a stream.
        prompt_logprobs: the log-probabilities of its prompt's tokens but the first, if requested.
    """

    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None
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
        if output.n_cached_tokens is not None:
            self.n_cached_tokens = output.n_cached_tokens


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
        """Return a choice's entries for new output, one per chunk; the last has no content."""

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return a choice's entry without any output."""

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return how many tokens of new output are reasoning; to be called once per output."""


class ChatChoiceFormatter:
    """Formats chat completions: messages, or deltas of messages.

    Args:
        token_bytes: returns the bytes of a token, for log-probabilities; None reports none.
        message_format: how reasoning and tool calls are found in the text.
        n_top: candidates per token in log-probabilities.
        as_ids: whether log-probabilities name tokens by their IDs.
        origin: of the ids of tool calls.
    """

    id_prefix = "chatcmpl"
    object_type = "chat.completion"
    chunk_object_type = "chat.completion.chunk"

    def __init__(
        self,
        token_bytes: TokenBytes | None = None,
        message_format: MessageFormat | None = None,
        *,
        n_top: int | None = None,
        as_ids: bool = False,
        origin: Origin | None = None,
    ) -> None:
        self._token_bytes = token_bytes
        self._n_top = n_top
        self._as_ids = as_ids
        self._origin = origin or Origin()
        self._n_calls = 0
        self._format = message_format or MessageFormat()
        self._tool_config = self._format.tool_config
        self._parsers: dict[int, AnyMessageParser] = {}
        self._counters: dict[int, AnyMessageParser] = {}
        self._custom_calls: dict[tuple[int, int], str] = {}  # (choice, call) -> arguments so far

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a choice with its message; reasoning and tool calls are parsed from the text."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        finish_reason = choice.finish_reason
        if not self._format.is_plain:
            parser = self._format.new_parser()
            events = [*parser.feed(choice.text), *parser.flush()]
            message |= self._message_parts(events, choice.text)
            n_calls = len(message.get("tool_calls", ()))
            finish_reason = self._finish_reason(finish_reason, n_calls=n_calls)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _message_parts(self, events: Sequence[MessageEvent], text: str) -> dict[str, Any]:
        """Return the fields of a message that its events make up; without any it is its text."""
        content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
        tool_calls = self._tool_calls(events)
        if not (tool_calls or self._format.has_reasoning):
            return {"content": text}
        is_empty_answer = not (content or tool_calls or reasoning)
        parts: dict[str, Any] = {"content": "" if is_empty_answer else content or None}
        if tool_calls:
            parts["tool_calls"] = tool_calls
        if reasoning and self._format.includes_reasoning:
            parts |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return parts

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return how many tokens of new output are reasoning; to be called once per output."""
        if not self._format.has_reasoning:
            return 0
        if (counter := self._counters.get(index)) is None:
            counter = self._counters[index] = self._format.new_parser()
        was_reasoning = counter.is_reasoning
        counter.feed(output.text)
        return output.n_tokens if was_reasoning or counter.is_reasoning else 0

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the delta that sets the role."""
        return self._chunk_choice(index, {"role": "assistant", "content": ""})

    def format_chunks(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's deltas; the one with the finish reason is empty."""
        message_deltas, finish_reason = self._message_deltas(index, output)
        logprobs = self._logprobs(output.logprobs) if output.logprobs else None
        if logprobs is not None and not message_deltas:
            message_deltas = [{"content": ""}]
        chunks = [self._chunk_choice(index, delta) for delta in message_deltas]
        if logprobs is not None:
            chunks[0]["logprobs"] = logprobs
        if finish_reason is not None:
            final_chunk = self._chunk_choice(index, {}, finish_reason)
            chunks.append({**final_chunk, "stop_reason": output.stop_reason})
        return chunks

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return an empty delta."""
        return self._chunk_choice(index, {})

    def _message_deltas(
        self, index: int, output: CompletionOutput
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return the message deltas of new output, and its finish reason if it has one."""
        if self._format.is_plain:
            return ([{"content": output.text}] if output.text else []), output.finish_reason
        if (parser := self._parsers.get(index)) is None:
            parser = self._parsers[index] = self._format.new_parser()
        events = [*parser.feed(output.text)]
        if output.finish_reason is not None:
            events += parser.flush()
        finish_reason = self._finish_reason(output.finish_reason, n_calls=parser.n_calls)
        deltas = [delta for event in events if (delta := self._message_delta(index, event))]
        if output.finish_reason is not None:
            deltas += self._custom_inputs(index)
        return deltas, finish_reason

    def _message_delta(self, choice: int, event: MessageEvent) -> dict[str, Any] | None:
        """Return the delta of an event; None for what is held back or not to be told."""
        if isinstance(event, ReasoningDelta):
            fields = {"reasoning": event.text, "reasoning_content": event.text}
            return fields if self._format.includes_reasoning else None
        if isinstance(event, ContentDelta):
            return {"content": event.text}
        if isinstance(event, ToolCallArgumentsDelta):
            if (choice, event.index) in self._custom_calls:
                self._custom_calls[choice, event.index] += event.text
                return None
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        call = self._new_tool_call(event.name)
        if call["type"] == "custom":
            self._custom_calls[choice, event.index] = ""
        return {"tool_calls": [{"index": event.index, **call}]}

    def _custom_inputs(self, choice: int) -> list[dict[str, Any]]:
        """Return the deltas of a finished choice's custom calls: their inputs."""
        return [
            {"tool_calls": [{"index": call, "custom": {"input": _custom_input(arguments)}}]}
            for (of_choice, call), arguments in self._custom_calls.items()
            if of_choice == choice
        ]

    def _tool_calls(self, events: Sequence[MessageEvent]) -> list[dict[str, Any]]:
        tool_calls = [
            self._new_tool_call(event.name) for event in events if isinstance(event, ToolCallStart)
        ]
        arguments = [""] * len(tool_calls)
        for event in events:
            if isinstance(event, ToolCallArgumentsDelta):
                arguments[event.index] += event.text
        for call, text in zip(tool_calls, arguments, strict=True):
            if call["type"] == "custom":
                call["custom"]["input"] = _custom_input(text)
            else:
                call["function"]["arguments"] = text
        return tool_calls

    def _new_tool_call(self, name: str) -> dict[str, Any]:
        config = self._tool_config
        length = 24 if config is None else config.call_id_length
        # Some chat templates accept call ids of a fixed length only, of letters and digits.
        prefix = "call_" if length > len("call_") * 2 else ""
        self._n_calls += 1
        call_id = prefix + self._origin.characters(
            _CALL_ID_CHARACTERS, length - len(prefix), "call", self._n_calls
        )
        if config is not None and name in config.custom_tools:
            return {"id": call_id, "type": "custom", "custom": {"name": name, "input": ""}}
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _finish_reason(self, reason: str | None, *, n_calls: int) -> str | None:
        # As OpenAI does: a call of a tool that the request named finishes with "stop".
        is_named = self._tool_config is not None and self._tool_config.choice_mode == "named"
        return "tool_calls" if n_calls and reason == "stop" and not is_named else reason

    def _logprobs(self, token_logprobs: OffsetLogprobs) -> dict[str, Any] | None:
        if self._token_bytes is None:
            return None
        return to_chat_logprobs(
            token_logprobs, self._token_bytes, n_top=self._n_top, as_ids=self._as_ids
        )

    def _chunk_choice(
        self, index: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _custom_input(arguments: str) -> str:
    """Return the text in the arguments of a custom call; the arguments if there is none."""
    try:
        value = json.loads(arguments)[CUSTOM_TOOL_INPUT]
    except (ValueError, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else arguments


class CompletionChoiceFormatter:
    """Formats text completions.

    Args:
        token_bytes: returns the bytes of a token, for log-probabilities; None reports none.
        echoed_prompts: the prompt of each choice, to precede its text; None echoes none.
        prompts: token IDs of each choice's prompt, for log-probabilities of echoed prompts.
        n_top: candidates per token in log-probabilities.
        as_ids: whether log-probabilities name tokens by their IDs.
    """

    id_prefix = "cmpl"
    object_type = "text_completion"
    chunk_object_type = "text_completion"

    def __init__(
        self,
        token_bytes: TokenBytes | None = None,
        echoed_prompts: Sequence[str] | None = None,
        *,
        prompts: Sequence[Sequence[int]] = (),
        n_top: int | None = None,
        as_ids: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._echoed_prompts = echoed_prompts
        self._prompts = prompts
        self._scored_prompts: dict[int, list[SampledLogprob]] = {}  # of streams, until echoed
        self._echoed: set[int] = set()
        self._n_top = n_top
        self._token_name = (
            token_id_name if as_ids or token_bytes is None else legacy_token_name(token_bytes)
        )

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a choice with its text, after the echoed prompt."""
        text = self._echoed_prompt(index) + choice.text
        text_choice = self._text_choice(
            index, text, token_logprobs=choice.logprobs, finish_reason=choice.finish_reason
        )
        if self._echoed_prompts is not None and text_choice["logprobs"] is not None:
            of_prompt = self._prompt_logprobs(index, choice.prompt_logprobs)
            logprobs = text_choice["logprobs"]
            text_choice["logprobs"] = {n: of_prompt[n] + logprobs[n] for n in logprobs}
        return {**text_choice, "stop_reason": choice.stop_reason}

    def _prompt_logprobs(
        self, index: int, prompt_logprobs: Sequence[SampledLogprob]
    ) -> dict[str, Any]:
        """Return log-probabilities of a choice's echoed prompt; its first token has none."""
        assert self._token_bytes is not None
        prompt = self._prompts[index]
        offsets = text_offsets(prompt, self._token_bytes)
        scored = list(zip(offsets[1:], prompt_logprobs, strict=True))
        of_prompt = to_completion_logprobs(
            scored, self._token_name, first_text_offset=0, n_top=self._n_top
        )
        first: dict[str, Any] = {
            "tokens": self._token_name(prompt[0]),
            "token_logprobs": None,
            "top_logprobs": None,
            "text_offset": 0,
        }
        return {name: [first[name], *values] for name, values in of_prompt.items()}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the echoed prompt, if any; text completions have no role.

        One with log-probabilities follows when they are known.
        """
        if not self._echoed_prompts or self._prompts:
            return None
        return self._text_choice(index, self._echoed_prompt(index))

    def _scored_prompt(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return the echoed prompt with its log-probabilities, once, when all are known."""
        if not self._echoed_prompts or not self._prompts or index in self._echoed:
            return []
        scored = self._scored_prompts.setdefault(index, [])
        scored += output.prompt_logprobs
        if len(scored) < len(self._prompts[index]) - 1:
            return []
        self._echoed.add(index)
        chunk = self._text_choice(index, self._echoed_prompt(index))
        return [
            {**chunk, "logprobs": self._prompt_logprobs(index, self._scored_prompts.pop(index))}
        ]

    def format_chunks(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's text; the entry with the finish reason is empty."""
        chunks = self._scored_prompt(index, output)
        if output.text or output.logprobs:
            chunks.append(self._text_choice(index, output.text, token_logprobs=output.logprobs))
        if output.finish_reason is not None:
            final_chunk = self._text_choice(index, "", finish_reason=output.finish_reason)
            chunks.append({**final_chunk, "stop_reason": output.stop_reason})
        return chunks

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return an empty text."""
        return self._text_choice(index, "")

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return 0: a text has no parts."""
        return 0

    def _echoed_prompt(self, index: int) -> str:
        return self._echoed_prompts[index] if self._echoed_prompts else ""

    def _text_choice(
        self,
        index: int,
        text: str,
        *,
        token_logprobs: OffsetLogprobs = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = None
        is_whole = bool(token_logprobs) or finish_reason is None or bool(self._prompts)
        if self._token_bytes is not None and is_whole:
            offset = len(self._echoed_prompt(index))
            logprobs = to_completion_logprobs(
                token_logprobs, self._token_name, first_text_offset=offset, n_top=self._n_top
            )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


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
        n_cached = self._n_cached_tokens()
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
            "prompt_tokens_details": (
                None if n_cached is None else {"audio_tokens": 0, "cached_tokens": n_cached}
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
        n_each = self._counts.n_choices_per_prompt
        return sum(min(known[i : i + n_each]) for i in range(0, len(known), n_each))
