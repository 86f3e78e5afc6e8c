"""The spans of a generation by vLLM: the same as the router's own engine has.

An HTTP request has one generation span, within which each choice has queueing, prefill and
decoding, made of times when it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.api.request_span import CHAT, PROVIDER, TEXT_COMPLETION
from faasmoe_router.engine.sequence_spans import record_sequence
from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes
from faasmoe_tracing import Attribute, Span

COMPLETIONS_PATH = "/v1/completions"


class Sampling(Protocol):
    """What is traced of a request's parameters, such as vLLM's `SamplingParams`."""

    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    frequency_penalty: float
    presence_penalty: float


def begin_generation(
    http_span: Span, path: str, body: Mapping[str, Any], *, model: str, tenant: str
) -> Span:
    """Begin the span of a generation; the HTTP span itself if it is not recorded.

    Args:
        http_span: the request's span.
        path: its route.
        body: its parameters.
        model: name of the served model.
        tenant: whose request it is; empty without tenants.
    """
    if not http_span.is_recorded:
        return http_span
    operation = TEXT_COMPLETION if path == COMPLETIONS_PATH else CHAT
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.output.type": "text",
        "gen_ai.request.stream": body.get("stream") is True,
    }
    if tenant:
        attributes["faasmoe.tenant"] = tenant
    return http_span.child(f"{operation} {model}", attributes=attributes)


@dataclass(slots=True)
class GenerationTrace:
    """Takes the times of the choices of one prompt; writes spans when they have ended.

    Attributes:
        span: the generation's span.
        n_prompt: tokens of the prompt.
        arrival_s: when it was queued (monotonic clock, as all times here).
        started_s: when it got its place.
    """

    span: Span
    n_prompt: int
    arrival_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    _first_s: dict[int, float] = field(default_factory=dict)
    _n_tokens: dict[int, int] = field(default_factory=dict)
    _reasons: dict[int, str] = field(default_factory=dict)

    def begin(self, params: Sampling) -> None:
        """Record that the prompt has its place, and what was asked for."""
        self.started_s = time.monotonic()
        self.span.set(
            {
                "gen_ai.request.choice.count": params.n,
                "gen_ai.request.max_tokens": params.max_tokens or 0,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.frequency_penalty": params.frequency_penalty,
                "gen_ai.request.presence_penalty": params.presence_penalty,
                "gen_ai.usage.input_tokens": self.n_prompt,
            }
        )

    def add(self, index: int, n_tokens: int, finish_reason: str | None, *, n_cached: int) -> None:
        """Record new tokens of a choice; its spans are written with its last.

        Args:
            index: the choice.
            n_tokens: its tokens so far.
            finish_reason: why it ended; None while it runs.
            n_cached: tokens of the prompt that were found in the prefix cache.
        """
        if not self.span.is_recorded or index in self._reasons:
            return
        now_s = time.monotonic()
        first_s = self._first_s.setdefault(index, now_s)
        self._n_tokens[index] = n_tokens
        if finish_reason is None:
            return
        self._reasons[index] = finish_reason
        record_sequence(
            self.span,
            SequenceTimes(self.arrival_s, self.started_s, first_s, now_s),
            SequenceCounts(self.n_prompt, n_cached, n_tokens),
            index=index,
            finish_reason=finish_reason,
        )

    def end(self) -> None:
        """Record the tokens and finish reasons of all choices."""
        if self.span.is_recorded:
            self.span.set(
                {
                    "gen_ai.usage.output_tokens": sum(self._n_tokens.values()),
                    "gen_ai.response.finish_reasons": [
                        reason for _, reason in sorted(self._reasons.items())
                    ],
                }
            )
