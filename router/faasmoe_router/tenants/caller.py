"""A tenant as its requests meet it: what they may ask for, and the ticket of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.tenants.usage import RequestOutcome


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, and within what bounds; by default nobody in particular, without any.

    Attributes:
        tenant: its name; empty in a router that is open.
        model_alias: what the model may be called beside its own name.
        system_prompt: stands before conversations that have no system message.
        max_model_len: tokens of one request, prompt and output together.
        max_output_tokens: tokens that one choice may generate.
        max_request_tokens: tokens that a whole request may reserve, all its choices together.
    """

    tenant: str = ""
    model_alias: str | None = None
    system_prompt: str | None = None
    max_model_len: int | None = None
    max_output_tokens: int | None = None
    max_request_tokens: int | None = None

    def model_names(self, model_name: str) -> tuple[str, ...]:
        """Return what this caller may call the model."""
        names = (model_name, self.model_alias)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def effective_max_model_len(self, max_model_len: int) -> int:
        """Return how long this caller's requests may be, where others' may be of `context`."""
        return min(max_model_len, self.max_model_len or max_model_len)

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation with the caller's system prompt, if it needs one."""
        has_system_message = any(message["role"] in ("system", "developer") for message in messages)
        if self.system_prompt is None or has_system_message:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


ANONYMOUS = Caller()


class UsageRecorder(Protocol):
    """A request that was let in: hears what becomes of it, and settles when it has ended."""

    headers: Mapping[str, str]

    def record_started(self) -> None:
        """Hear that it is computed: its prompt counts from now on."""

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Hear of tokens of one sequence; the last ones come with its end."""

    def record_failure(self) -> None:
        """Hear that it cannot be finished, by no fault of its own."""

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Settle; later calls do nothing. Without an outcome it is as the sequences have ended."""


class NullUsageRecorder:
    """The ticket of a router that is open: nothing is counted."""

    headers: Mapping[str, str] = {}

    def record_started(self) -> None:
        """Do nothing."""

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Do nothing."""

    def record_failure(self) -> None:
        """Do nothing."""

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Do nothing."""


@dataclass(slots=True)
class TenantUsageRecorder:
    """The ticket of a tenant's request.

    Attributes:
        headers: what the answer says of the tenant's limits.
        n_sequences: its choices.
        n_prompt: tokens of its prompts, each prompt once.
        settle: gets the tokens used, prompt and generated, and the outcome, once.
    """

    headers: Mapping[str, str]
    n_sequences: int
    n_prompt_tokens: int
    on_finish: Callable[[int, int, RequestOutcome], None]
    _n_generated_tokens: int = field(default=0, init=False)
    _n_finished: int = field(default=0, init=False)
    _is_started: bool = field(default=False, init=False)
    _has_failed: bool = field(default=False, init=False)
    _is_finished: bool = field(default=False, init=False)

    def record_started(self) -> None:
        """Count its prompt."""
        self._is_started = True

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Count tokens, and the end of a sequence."""
        self._n_generated_tokens += n_tokens
        self._n_finished += is_last

    def record_failure(self) -> None:
        """Count a fault of ours."""
        self._has_failed = True

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Settle, once."""
        if self._is_finished:
            return
        self._is_finished = True
        n_prompt_tokens = self.n_prompt_tokens if self._is_started else 0
        self.on_finish(n_prompt_tokens, self._n_generated_tokens, outcome or self._derive_outcome())

    def _derive_outcome(self) -> RequestOutcome:
        if self._n_finished == self.n_sequences:
            return "completed"
        return "failed" if self._has_failed else "cancelled"
