"""The bodies of answers: whole ones and a stream's events, for both kinds of completion."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from faasmoe_router.api.requests import StreamOptions
from faasmoe_router.api.shapes import Choice, Shape
from faasmoe_router.engine.generation import Generation


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
        self, generation: Generation, options: StreamOptions
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        head = self._head.named(self._shape.chunk_kind)
        for index in range(len(self._choices)):
            if (opening := self._shape.opening(index)) is not None:
                yield {**head, "choices": [opening], **self._usage_so_far(options)}
        async for index, delta in generation:
            self._choices[index].n_tokens += delta.n_tokens
            for piece in self._shape.pieces(index, delta):
                yield {**head, "choices": [piece], **self._usage_so_far(options)}
        if options.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _usage_so_far(self, options: StreamOptions) -> dict[str, Any]:
        if not options.include_usage:
            return {}
        return {"usage": self._usage() if options.continuous_usage_stats else None}

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
