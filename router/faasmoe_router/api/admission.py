"""Admission: what may happen to a request between its being right and its being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol, Self

from fastapi import Request

from faasmoe_router.api.stream import unless_hung_up
from faasmoe_router.engine.generation import GenerationRequest

Holding = Callable[..., AbstractContextManager[None]]
COLD_START_HEADER = "X-FaaSMoE-Cold-Start"


class Admission(AbstractAsyncContextManager["Admission"], Protocol):
    """Holds requests whose functions are not there; runs while the app does."""

    @property
    def ready(self) -> bool:
        """Whether requests can be served at all."""

    def is_open_for(self, n_tokens: int) -> bool:
        """Return whether a request of so many tokens need not be held."""

    async def hold(self, n_tokens: int, *, size_bytes: int) -> float:
        """Hold a request; return for how long, in seconds; raises RouterError to refuse it."""


class OpenAdmission:
    """Admits everything: the functions are where the table says and stay there."""

    ready = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def is_open_for(self, n_tokens: int) -> bool:
        """Return that it need not."""
        return True

    async def hold(self, n_tokens: int, *, size_bytes: int) -> float:
        """Return at once."""
        return 0.0


def _uncounted(*, size_bytes: int) -> AbstractContextManager[None]:
    return nullcontext()


async def admit(
    admission: Admission,
    request: Request,
    requests: Sequence[GenerationRequest],
    *,
    holding: Holding = _uncounted,
) -> dict[str, str]:
    """Wait until a request may be generated; return the headers that tell how long it waited.

    Args:
        admission: what may hold it.
        request: the request.
        requests: what it asks for.
        holding: counts it while it waits, with its `size_bytes`; may refuse it.

    Raises:
        ClientGone: the client hung up meanwhile.
        RouterError: it is refused.
    """
    n_tokens = sum(len(ids) for ids in {r.prompt_ids for r in requests})
    if admission.is_open_for(n_tokens):
        return {}
    size_bytes = len(await request.body())
    with holding(size_bytes=size_bytes):
        waited_s = await unless_hung_up(request, admission.hold(n_tokens, size_bytes=size_bytes))
    return {COLD_START_HEADER: f"{waited_s:.3f}"}
