"""Admission: what may happen to a request between its being right and its being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol, Self

from fastapi import Request

from faasmoe_router.api.streaming import run_until_disconnect
from faasmoe_router.engine.generation import GenerationRequest

QueueSlot = Callable[..., AbstractContextManager[None]]
COLD_START_HEADER = "X-FaaSMoE-Cold-Start"


class RequestActivator(AbstractAsyncContextManager["RequestActivator"], Protocol):
    """Holds requests whose functions are not there; runs while the app does."""

    @property
    def ready(self) -> bool:
        """Whether requests can be served at all."""

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return whether a request of so many tokens need not be held."""

    async def wait_for_activation(self, n_tokens: int, *, size_bytes: int) -> float:
        """Hold a request; return for how long, in seconds; raises RouterError to refuse it."""


class AlwaysActivated:
    """Admits everything: the functions are where the table says and stay there."""

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
        """Return that it need not."""
        return True

    async def wait_for_activation(self, n_tokens: int, *, size_bytes: int) -> float:
        """Return at once."""
        return 0.0


def _unlimited_queue_slot(*, size_bytes: int) -> AbstractContextManager[None]:
    return nullcontext()


async def queue_until_activated(
    activator: RequestActivator,
    request: Request,
    generation_requests: Sequence[GenerationRequest],
    *,
    queue_slot: QueueSlot = _unlimited_queue_slot,
) -> dict[str, str]:
    """Wait until a request may be generated; return the headers that tell how long it waited.

    Args:
        activator: what may queue it.
        request: the request.
        generation_requests: what it asks for.
        queue_slot: counts it while it waits, with its `size_bytes`; may refuse it.

    Raises:
        ClientGone: the client hung up meanwhile.
        RouterError: it is refused.
    """
    n_tokens = sum(len(ids) for ids in {r.prompt_token_ids for r in generation_requests})
    if activator.is_activated_for(n_tokens):
        return {}
    size_bytes = len(await request.body())
    with queue_slot(size_bytes=size_bytes):
        queued_s = await run_until_disconnect(
            request, activator.wait_for_activation(n_tokens, size_bytes=size_bytes)
        )
    return {COLD_START_HEADER: f"{queued_s:.3f}"}
