"""Log-probabilities as OpenAI tells them: for chats, and in the older way for completions.

How each kind of completion tells its choices, whole or as a stream's pieces.

The bodies of answers: whole ones and a stream's events, for both kinds of completion.
"""

import json
import secrets
import string
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.api.protocol import StreamOptions
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.engine.generation import CompletionOutput, Generation, StopReason
from faasmoe_router.engine.sampler import SampledLogprob
from faasmoe_router.toolcalls.parser import (
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallEvent,
    ToolCallParser,
    ToolCallStart,
)

TokenBytes = Callable[[int], bytes]
OffsetLogprobs = Sequence[tuple[int, SampledLogprob]]


def to_chat_logprobs(token_logprobs: OffsetLogprobs, token_bytes: TokenBytes) -> dict[str, Any]:
    """Return a chat choice's `logprobs`."""

    def token_entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_bytes(token)
        return {
            "token": text.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(text),
        }

    token_entries = [
        {
            **token_entry(found.token, found.logprob),
            "top_logprobs": [token_entry(token, logprob) for token, logprob in found.top_logprobs],
        }
        for _, found in token_logprobs
    ]
    return {"content": token_entries, "refusal": None}


def to_completion_logprobs(
    token_logprobs: OffsetLogprobs, token_bytes: TokenBytes, *, first_text_offset: int
) -> dict[str, Any]:
    """Return a completion choice's `logprobs`.

    Args:
        token_logprobs: the log-probabilities of each token.
        token_bytes: what a token stands for.
        first_text_offset: the characters that come before the first token's text.
    """

    def token_text(token: int) -> str:
        text = token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

    def top_logprobs(token_logprob: SampledLogprob) -> dict[str, float]:
        # Reversed, so that of two tokens of one name the likelier is told.
        return {
            token_text(token): logprob
            for token, logprob in reversed(
                [*token_logprob.top_logprobs, (token_logprob.token, token_logprob.logprob)]
            )
        }

    return {
        "tokens": [token_text(found.token) for _, found in token_logprobs],
        "token_logprobs": [found.logprob for _, found in token_logprobs],
        "top_logprobs": [top_logprobs(found) for _, found in token_logprobs],
        "text_offset": [first_text_offset + at for at, _ in token_logprobs],
    }


_CALL_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(slots=True)
class ChoiceState:
    """One sequence of an answer, as far as it has come."""

    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None
    logprobs: list[Any] = field(default_factory=list)

    def add(self, delta: CompletionOutput) -> None:
        """Append a step."""
        self.add_counts(delta)
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.logprobs += delta.logprobs

    def add_counts(self, delta: CompletionOutput) -> None:
        """Count a step's tokens."""
        self.n_tokens += delta.n_tokens
        if delta.n_cached_tokens is not None:
            self.n_cached_tokens = delta.n_cached_tokens


class ChoiceFormatter(Protocol):
    """How one kind of completion tells its choices."""

    id_prefix: str
    object_type: str
    chunk_object_type: str

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a finished choice."""

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return what a stream tells first of a choice, if anything."""

    def format_chunks(self, index: int, delta: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's parts of a stream's next events, one for each event."""


class ChatChoiceFormatter:
    """Chat completions: messages and deltas of messages.

    Args:
        token_bytes: what a token stands for, for log-probabilities; None tells none.
        tool_config: how tools are called, if they are.
    """

    id_prefix = "chatcmpl"
    object_type = "chat.completion"
    chunk_object_type = "chat.completion.chunk"

    def __init__(
        self, token_bytes: TokenBytes | None = None, tool_config: ToolCallConfig | None = None
    ) -> None:
        self._token_bytes = token_bytes
        self._tool_config = tool_config
        self._parsers: dict[int, ToolCallParser] = {}

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a finished choice."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        finish_reason = choice.finish_reason
        if self._tool_config is not None:
            parser = self._tool_config.new_parser()
            pieces = [*parser.feed(choice.text), *parser.flush()]
            if tool_calls := self._tool_calls(pieces):
                content = "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))
                message |= {"content": content or None, "tool_calls": tool_calls}
            finish_reason = self._finish_reason(finish_reason, n_calls=len(tool_calls))
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the delta that tells the role."""
        return self._chunk_choice(index, {"role": "assistant", "content": ""})

    def format_chunks(self, index: int, delta: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's deltas; the last one is empty."""
        message_deltas, finish_reason = self._message_deltas(index, delta)
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if logprobs is not None and not message_deltas:
            message_deltas = [{"content": ""}]
        chunks = [self._chunk_choice(index, part) for part in message_deltas]
        if logprobs is not None:
            chunks[0]["logprobs"] = logprobs
        if finish_reason is not None:
            final_chunk = self._chunk_choice(index, {}, finish_reason)
            chunks.append({**final_chunk, "stop_reason": delta.stop_reason})
        return chunks

    def _message_deltas(
        self, index: int, delta: CompletionOutput
    ) -> tuple[list[dict[str, Any]], str | None]:
        if self._tool_config is None:
            return ([{"content": delta.text}] if delta.text else []), delta.finish_reason
        parser = self._parsers.setdefault(index, self._tool_config.new_parser())
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.flush()
        finish_reason = self._finish_reason(delta.finish_reason, n_calls=parser.n_calls)
        return [self._message_delta(piece) for piece in pieces], finish_reason

    def _message_delta(self, piece: ToolCallEvent) -> dict[str, Any]:
        """Return what a delta tells of a piece of text."""
        if isinstance(piece, ContentDelta):
            return {"content": piece.text}
        if isinstance(piece, ToolCallArgumentsDelta):
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        return {"tool_calls": [{"index": piece.index, **self._new_tool_call(piece.name)}]}

    def _tool_calls(self, pieces: Sequence[ToolCallEvent]) -> list[dict[str, Any]]:
        tool_calls = [
            self._new_tool_call(piece.name) for piece in pieces if isinstance(piece, ToolCallStart)
        ]
        for piece in pieces:
            if isinstance(piece, ToolCallArgumentsDelta):
                tool_calls[piece.index]["function"]["arguments"] += piece.text
        return tool_calls

    def _new_tool_call(self, name: str) -> dict[str, Any]:
        assert self._tool_config is not None
        length = self._tool_config.call_format.call_id_length
        # Some templates take back ids of their own length only, of letters and digits.
        prefix = "call_" if length > len("call_") * 2 else ""
        call_id = prefix + "".join(
            secrets.choice(_CALL_ID_CHARACTERS) for _ in range(length - len(prefix))
        )
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _finish_reason(self, reason: str | None, *, n_calls: int) -> str | None:
        # OpenAI says so too: a call of the one tool that was named ends with stop.
        is_named = self._tool_config is not None and self._tool_config.choice_mode == "named"
        return "tool_calls" if n_calls and reason == "stop" and not is_named else reason

    def _logprobs(self, token_logprobs: OffsetLogprobs) -> dict[str, Any] | None:
        return (
            None
            if self._token_bytes is None
            else to_chat_logprobs(token_logprobs, self._token_bytes)
        )

    def _chunk_choice(
        self, index: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class CompletionChoiceFormatter:
    """Text completions.

    Args:
        token_bytes: what a token stands for, for log-probabilities; None tells none.
        echoed_prompts: the prompt of each choice, where it is told ahead of the text.
    """

    id_prefix = "cmpl"
    object_type = "text_completion"
    chunk_object_type = "text_completion"

    def __init__(
        self, token_bytes: TokenBytes | None = None, echoed_prompts: Sequence[str] | None = None
    ) -> None:
        self._token_bytes = token_bytes
        self._echoed_prompts = echoed_prompts

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a finished choice."""
        text = self._echoed_prompt(index) + choice.text
        text_choice = self._text_choice(
            index, text, token_logprobs=choice.logprobs, finish_reason=choice.finish_reason
        )
        return {**text_choice, "stop_reason": choice.stop_reason}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the prompt, if it is told: text has no role."""
        return (
            self._text_choice(index, self._echoed_prompt(index)) if self._echoed_prompts else None
        )

    def format_chunks(self, index: int, delta: CompletionOutput) -> list[dict[str, Any]]:
        """Return pieces of text; the last one is empty."""
        chunks = []
        if delta.text or delta.logprobs:
            chunks.append(self._text_choice(index, delta.text, token_logprobs=delta.logprobs))
        if delta.finish_reason is not None:
            final_chunk = self._text_choice(index, "", finish_reason=delta.finish_reason)
            chunks.append({**final_chunk, "stop_reason": delta.stop_reason})
        return chunks

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
        if self._token_bytes is not None and (token_logprobs or finish_reason is None):
            offset = len(self._echoed_prompt(index))
            logprobs = to_completion_logprobs(
                token_logprobs, self._token_bytes, first_text_offset=offset
            )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


# Nothing is predicted, and what a model thinks is told with the rest of its text.
_COMPLETION_TOKENS_DETAILS = {
    "accepted_prediction_tokens": 0,
    "audio_tokens": 0,
    "reasoning_tokens": 0,
    "rejected_prediction_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class ResponseMeta:
    """What every part of one answer begins with.

    Attributes:
        id_prefix: what its id starts with.
        model: what the request calls the model.
        extra_fields: fields of the server and of the request that each part repeats.
        id: the rest of its id.
        created_s: when it began, seconds since the epoch.
    """

    id_prefix: str
    model: str
    extra_fields: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def to_fields(self, object_type: str) -> dict[str, Any]:
        """Return the fields, for an object of this kind."""
        return {
            "id": f"{self.id_prefix}-{self.id}",
            "object": object_type,
            "created": self.created_s,
            "model": self.model,
            **self.extra_fields,
        }


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """How much one request asks for.

    Attributes:
        n_prompt_tokens: tokens of its prompts, each prompt once.
        n_choices: the choices of all prompts.
        n_choices_per_prompt: the choices of each prompt.
    """

    n_prompt_tokens: int
    n_choices: int
    n_choices_per_prompt: int


class ResponseBuilder:
    """One completion that is being generated, told whole or as events."""

    def __init__(
        self, formatter: ChoiceFormatter, meta: ResponseMeta, counts: RequestCounts
    ) -> None:
        self._formatter = formatter
        self._meta = meta
        self._counts = counts
        self._choices = [ChoiceState() for _ in range(counts.n_choices)]

    async def full_response(self, generation: Generation) -> dict[str, Any]:
        """Return the body of the whole answer, once it is there."""
        async with generation:
            async for index, delta in generation:
                self._choices[index].add(delta)
        choices = [
            self._formatter.format_choice(i, choice) for i, choice in enumerate(self._choices)
        ]
        return {
            **self._meta.to_fields(self._formatter.object_type),
            "choices": choices,
            "usage": self._usage(),
        }

    async def stream_chunks(
        self, generation: Generation, options: StreamOptions
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        chunk_fields = self._meta.to_fields(self._formatter.chunk_object_type)
        for index in range(len(self._choices)):
            if (first_chunk := self._formatter.first_chunk(index)) is not None:
                yield {**chunk_fields, "choices": [first_chunk], **self._chunk_usage(options)}
        async for index, delta in generation:
            self._choices[index].add_counts(delta)
            for chunk in self._formatter.format_chunks(index, delta):
                yield {**chunk_fields, "choices": [chunk], **self._chunk_usage(options)}
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
            "completion_tokens_details": dict(_COMPLETION_TOKENS_DETAILS),
        }

    def _n_cached_tokens(self) -> int | None:
        """Return the prompts' tokens that were in the cache; None while that is not known.

        A prompt's choices find in the cache what the first of them has put there; what was there
        before is what the one that found least did find.
        """
        cached_per_choice = [choice.n_cached_tokens for choice in self._choices]
        known = [n for n in cached_per_choice if n is not None]
        if len(known) < len(cached_per_choice):
            return None
        n_each = self._counts.n_choices_per_prompt
        return sum(min(known[i : i + n_each]) for i in range(0, len(known), n_each))


def to_event_json(body: dict[str, Any]) -> bytes:
    """Return an event's JSON."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
