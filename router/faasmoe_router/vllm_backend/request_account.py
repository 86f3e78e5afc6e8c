"""A request as the router sees it while vLLM computes it: who sent it, and what it has used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from faasmoe_router.tenants.service import ANONYMOUS, Caller, RequestUsageRecorder
from faasmoe_router.vllm_backend.generation_span import GenerationTrace
from faasmoe_tracing import NO_SPAN, Span


@dataclass(slots=True)
class RequestContext:
    """What is known of an HTTP request where vLLM calls its engine.

    Attributes:
        caller: who sent it.
        has_token_limit: whether it says how many tokens to generate.
        headers: headers to add to its response.
        span: the span of its generation.
    """

    caller: Caller = ANONYMOUS
    has_token_limit: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    span: Span = NO_SPAN


REQUEST: ContextVar[RequestContext | None] = ContextVar("faasmoe_request", default=None)
"""The HTTP request that the running task serves."""


class ChoiceOutput(Protocol):
    """New output of one choice, such as vLLM's `CompletionOutput`."""

    @property
    def index(self) -> int:
        """The choice."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Its tokens: the new ones, or all so far."""

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None while it runs."""


@dataclass(slots=True)
class RequestAccount:
    """Counts the tokens of one request by the engine's outputs.

    Attributes:
        tenant: its tenant.
        id: its id in the fair queue.
        n_prompt: tokens of its prompt.
        recorder: records its usage.
        trace: takes the times of its choices.
    """

    tenant: str
    id: str
    n_prompt: int
    recorder: RequestUsageRecorder
    trace: GenerationTrace
    _n_tokens: dict[int, int] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)
    _is_prompt_computed: bool = False

    def add(
        self, choices: Iterable[ChoiceOutput], *, n_cached: int, is_delta: bool
    ) -> tuple[int, int]:
        """Record an output; return the tokens that were computed for it, and generated.

        Args:
            choices: the choices with news.
            n_cached: tokens of the prompt that were found in the prefix cache.
            is_delta: whether choices have their new tokens, rather than all so far.
        """
        n_computed = 0 if self._is_prompt_computed else self.n_prompt - n_cached
        self._is_prompt_computed = True
        n_generated = 0
        for choice in choices:
            n_generated += self._add_choice(choice, is_delta=is_delta)
            n_tokens = self._n_tokens[choice.index]
            self.trace.add(choice.index, n_tokens, choice.finish_reason, n_cached=n_cached)
        return n_computed + n_generated, n_generated

    def _add_choice(self, choice: ChoiceOutput, *, is_delta: bool) -> int:
        n_before = self._n_tokens.get(choice.index, 0)
        n_given = len(choice.token_ids)
        n_new = n_given if is_delta else n_given - n_before
        self._n_tokens[choice.index] = n_before + n_new
        is_last = choice.finish_reason is not None and choice.index not in self._finished
        if is_last:
            self._finished.add(choice.index)
        self.recorder.record_tokens(n_new, is_last=is_last)
        return n_new
