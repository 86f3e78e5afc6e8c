"""Admission control between validation and generation.

A validated request first needs its tenant's permission (`TenantAdmission`: rate limits, queue
quotas). If functions that it needs are scaled to zero, it is then queued until they are activated
(`RequestActivator`). Both are protocols: a router without tenants or without a control plane plugs
in an implementation that admits everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    contextmanager,
    nullcontext,
)
from types import TracebackType
from typing import Any, Protocol, Self

from fastapi import Request

from faasmoe_router.api.errors import ClientDisconnected
from faasmoe_router.api.streaming import run_until_disconnect
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import ActivationQueueFull, EngineQueueFull, TenantQueueFull
from faasmoe_router.tenants.service import Caller, RequestUsageRecorder
from faasmoe_tracing import NO_SPAN, Span

QueueSlot = Callable[..., AbstractContextManager[None]]
TOKEN_OBJECT_BYTES = 36  # of a token ID in a prompt: a Python int, and the reference to it
COLD_START_HEADER = "X-FaaSMoE-Cold-Start"


class TenantAdmission(AbstractAsyncContextManager[Any], Protocol):
    """Enforces tenants' limits; entered and exited with the app."""

    def count_request(self, caller: Caller) -> None:
        """Count a request before it costs anything, or raise RateLimitExceeded."""

    def admit(
        self,
        caller: Caller,
        requests: Sequence[GenerationRequest],
        *,
        n_prompt: int,
        request_id: str = "",
        is_admitted: bool = False,
    ) -> RequestUsageRecorder:
        """Admit the tokens of a request, `n_prompt` of them prompt tokens, or raise RouterError.

        One that another router has admitted is counted, not refused; its usage counts once for each
        `request_id`, unless that is empty.
        """

    def queue_slot(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Account for a request queued for activation, or raise RouterError on entry."""

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return the usage of the caller's tenant; None if usage is not recorded."""


class RequestActivator(AbstractAsyncContextManager["RequestActivator"], Protocol):
    """Queues requests until their functions are activated; entered and exited with the app."""

    @property
    def ready(self) -> bool:
        """Whether a routing table has been received, so that requests can be served at all."""

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return whether a request of `n_tokens` prompt tokens can start without queueing."""

    async def wait_for_activation(
        self, n_tokens: int, *, size_bytes: int, span: Span = NO_SPAN
    ) -> float:
        """Queue a request; return the seconds it waited, or raise RouterError to reject it."""


class AlwaysActivated:
    """A `RequestActivator` for fixed functions: nothing is ever queued."""

    ready = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return True."""
        return True

    async def wait_for_activation(
        self, n_tokens: int, *, size_bytes: int, span: Span = NO_SPAN
    ) -> float:
        """Return 0 s immediately."""
        return 0.0


def _unlimited_queue_slot(*, size_bytes: int) -> AbstractContextManager[None]:
    return nullcontext()


async def queue_until_activated(
    activator: RequestActivator,
    request: Request,
    generation_requests: Sequence[GenerationRequest],
    *,
    queue_slot: QueueSlot = _unlimited_queue_slot,
    span: Span = NO_SPAN,
) -> dict[str, str]:
    """Wait until the functions of a request are activated.

    Args:
        activator: queues the request.
        request: the HTTP request.
        generation_requests: the sequences to generate; choices of one prompt count once. What
            their prompts take counts against the queue's byte limit.
        queue_slot: called with `size_bytes`; held while the request is queued.
        span: traces the wait.

    Returns:
        Response headers: the cold-start header if the request was queued, else none.

    Raises:
        ClientDisconnected: the client hung up while the request was queued.
        RouterError: the request was rejected.
    """
    n_tokens = sum(len(ids) for ids in {r.prompt_token_ids for r in generation_requests})
    if activator.is_activated_for(n_tokens):
        return {}
    size_bytes = TOKEN_OBJECT_BYTES * n_tokens
    with queue_slot(size_bytes=size_bytes), span.child("hold") as hold:
        queued_s = await run_until_disconnect(
            request, activator.wait_for_activation(n_tokens, size_bytes=size_bytes, span=hold)
        )
    return {COLD_START_HEADER: f"{queued_s:.3f}"} if queued_s else {}


@contextmanager
def record_outcome_on_error(usage_recorder: RequestUsageRecorder) -> Iterator[None]:
    """Record the outcome of an admitted request that fails before its generation ends."""
    try:
        yield
    except (ClientDisconnected, asyncio.CancelledError):
        usage_recorder.finish("cancelled")
        raise
    except (EngineQueueFull, ActivationQueueFull, TenantQueueFull):
        usage_recorder.finish("limited")
        raise
    except BaseException:
        usage_recorder.finish("failed")
        raise
