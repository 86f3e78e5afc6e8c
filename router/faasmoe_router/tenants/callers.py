"""A tenant as its requests meet it: what they may ask for, and the ticket of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.tenants.usage import Outcome


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

    def context_of(self, context: int) -> int:
        """Return how long this caller's requests may be, where others' may be of `context`."""
        return min(context, self.max_model_len or context)

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation with the caller's system prompt, if it needs one."""
        has_one = any(message["role"] in ("system", "developer") for message in messages)
        if self.system_prompt is None or has_one:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


OPEN = Caller()


class Ticket(Protocol):
    """A request that was let in: hears what becomes of it, and settles when it has ended."""

    headers: Mapping[str, str]

    def started(self) -> None:
        """Hear that it is computed: its prompt counts from now on."""

    def took(self, n_tokens: int, *, is_last: bool) -> None:
        """Hear of tokens of one sequence; the last ones come with its end."""

    def failed(self) -> None:
        """Hear that it cannot be finished, by no fault of its own."""

    def end(self, outcome: Outcome | None = None) -> None:
        """Settle; later calls do nothing. Without an outcome it is as the sequences have ended."""


class OpenTicket:
    """The ticket of a router that is open: nothing is counted."""

    headers: Mapping[str, str] = {}

    def started(self) -> None:
        """Do nothing."""

    def took(self, n_tokens: int, *, is_last: bool) -> None:
        """Do nothing."""

    def failed(self) -> None:
        """Do nothing."""

    def end(self, outcome: Outcome | None = None) -> None:
        """Do nothing."""


@dataclass(slots=True)
class TenantTicket:
    """The ticket of a tenant's request.

    Attributes:
        headers: what the answer says of the tenant's limits.
        n_sequences: its choices.
        n_prompt: tokens of its prompts, each prompt once.
        settle: gets the tokens used, prompt and generated, and the outcome, once.
    """

    headers: Mapping[str, str]
    n_sequences: int
    n_prompt: int
    settle: Callable[[int, int, Outcome], None]
    _n_generated: int = field(default=0, init=False)
    _n_ended: int = field(default=0, init=False)
    _is_started: bool = field(default=False, init=False)
    _is_failed: bool = field(default=False, init=False)
    _is_settled: bool = field(default=False, init=False)

    def started(self) -> None:
        """Count its prompt."""
        self._is_started = True

    def took(self, n_tokens: int, *, is_last: bool) -> None:
        """Count tokens, and the end of a sequence."""
        self._n_generated += n_tokens
        self._n_ended += is_last

    def failed(self) -> None:
        """Count a fault of ours."""
        self._is_failed = True

    def end(self, outcome: Outcome | None = None) -> None:
        """Settle, once."""
        if self._is_settled:
            return
        self._is_settled = True
        n_prompt = self.n_prompt if self._is_started else 0
        self.settle(n_prompt, self._n_generated, outcome or self._outcome())

    def _outcome(self) -> Outcome:
        if self._n_ended == self.n_sequences:
            return "completed"
        return "failed" if self._is_failed else "cancelled"
