"""The bodies of answers: whole ones and a stream's events, for both kinds of completion."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.engine.generation import Delta, FinishReason, Generation


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer begins with."""

    prefix: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def named(self, kind: str) -> dict[str, Any]:
        """Return the fields, for an object of this kind."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
        }


@dataclass(slots=True)
class Choice:
    """One sequence of an answer, as far as it has come."""

    text: str = ""
    n_tokens: int = 0
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Append a step."""
        self.text += delta.text
        self.n_tokens += delta.n_tokens
        self.finish_reason = delta.finish_reason


class Shape(Protocol):
    """How one kind of completion tells its choices."""

    prefix: str
    kind: str
    chunk_kind: str

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream tells first of a choice, if anything."""

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """Return a choice's part of one event."""


class ChatShape:
    """Chat completions: messages and deltas of messages."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        """Return the delta that tells the role."""
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """Return a delta; the last one is empty."""
        return self._delta(index, {"content": text} if text else {}, reason)

    def _delta(
        self, index: int, delta: dict[str, str], reason: FinishReason | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class CompletionShape:
    """Text completions."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        return self.piece(index, choice.text, choice.finish_reason)

    def opening(self, index: int) -> None:
        """Return nothing: text has no role."""

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """Return a piece of text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


class Answer:
    """One completion that is being generated, told whole or as events."""

    def __init__(self, shape: Shape, model: str, *, n_choices: int, n_prompt_tokens: int) -> None:
        self._shape = shape
        self._head = Head(shape.prefix, model)
        self._choices = [Choice() for _ in range(n_choices)]
        self._n_prompt_tokens = n_prompt_tokens

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Return the body of the whole answer, once it is there."""
        async with generation:
            async for index, delta in generation:
                self._choices[index].add(delta)
        choices = [self._shape.choice(i, choice) for i, choice in enumerate(self._choices)]
        return {
            **self._head.named(self._shape.kind),
            "choices": choices,
            "usage": self._usage(),
        }

    async def events(
        self, generation: Generation, *, include_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        usage = {"usage": None} if include_usage else {}
        head = self._head.named(self._shape.chunk_kind)
        for index in range(len(self._choices)):
            if (opening := self._shape.opening(index)) is not None:
                yield {**head, "choices": [opening], **usage}
        async for index, delta in generation:
            self._choices[index].add(delta)
            for piece in self._pieces(index, delta):
                yield {**head, "choices": [piece], **usage}
        if include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        pieces = []
        if delta.text:
            pieces.append(self._shape.piece(index, delta.text, None))
        if delta.finish_reason is not None:
            pieces.append(self._shape.piece(index, "", delta.finish_reason))
        return pieces

    def _usage(self) -> dict[str, int]:
        n_completion = sum(choice.n_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": n_completion,
            "total_tokens": self._n_prompt_tokens + n_completion,
        }


def to_json(body: dict[str, Any]) -> bytes:
    """Return an event's JSON."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
