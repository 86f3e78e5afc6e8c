"""The bodies of answers: whole ones and a stream's events, for both kinds of completion."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from faasmoe_router.api.requests import StreamOptions
from faasmoe_router.api.shapes import Choice, Shape
from faasmoe_router.engine.generation import Generation

# Nothing is predicted, and what a model thinks is told with the rest of its text.
_COMPLETION_DETAILS = {
    "accepted_prediction_tokens": 0,
    "audio_tokens": 0,
    "reasoning_tokens": 0,
    "rejected_prediction_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer begins with.

    Attributes:
        prefix: what its id begins with.
        model: what the request calls the model.
        told: fields of the server and of the request that each part repeats.
        id: the rest of its id.
        created_s: when it began, seconds since the epoch.
    """

    prefix: str
    model: str
    told: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def named(self, kind: str) -> dict[str, Any]:
        """Return the fields, for an object of this kind."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            **self.told,
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """How much one request asks for.

    Attributes:
        n_prompt_tokens: tokens of its prompts, each prompt once.
        n_choices: the choices of all prompts.
        n_each: the choices of each prompt.
    """

    n_prompt_tokens: int
    n_choices: int
    n_each: int


class Answer:
    """One completion that is being generated, told whole or as events."""

    def __init__(self, shape: Shape, head: Head, asked: Asked) -> None:
        self._shape = shape
        self._head = head
        self._asked = asked
        self._choices = [Choice() for _ in range(asked.n_choices)]

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
            self._choices[index].count(delta)
            for piece in self._shape.pieces(index, delta):
                yield {**head, "choices": [piece], **self._usage_so_far(options)}
        if options.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _usage_so_far(self, options: StreamOptions) -> dict[str, Any]:
        if not options.include_usage:
            return {}
        return {"usage": self._usage() if options.continuous_usage_stats else None}

    def _usage(self) -> dict[str, Any]:
        n_prompt = self._asked.n_prompt_tokens
        n_completion = sum(choice.n_tokens for choice in self._choices)
        n_cached = self._n_cached()
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
            "prompt_tokens_details": (
                None if n_cached is None else {"audio_tokens": 0, "cached_tokens": n_cached}
            ),
            "completion_tokens_details": dict(_COMPLETION_DETAILS),
        }

    def _n_cached(self) -> int | None:
        """Return the prompts' tokens that were in the cache; None while that is not known.

        A prompt's choices find in the cache what the first of them has put there; what was there
        before is what the one that found least did find.
        """
        found = [choice.n_cached_tokens for choice in self._choices]
        known = [n for n in found if n is not None]
        if len(known) < len(found):
            return None
        n_each = self._asked.n_each
        return sum(min(known[i : i + n_each]) for i in range(0, len(known), n_each))


def to_json(body: dict[str, Any]) -> bytes:
    """Return an event's JSON."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
