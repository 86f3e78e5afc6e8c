"""A router without tenants: whoever reaches it may call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.tenants.callers import Caller, OpenTicket, Ticket


class OpenTenancy:
    """No tenants: whoever reaches the router may call, and nothing is counted."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> Ticket:
        """Let a request in."""
        return OpenTicket()

    @contextmanager
    def holding(self, caller: Caller, *, size_bytes: int) -> Iterator[None]:
        """Count nothing."""
        yield

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return that there are no accounts."""
        return None
