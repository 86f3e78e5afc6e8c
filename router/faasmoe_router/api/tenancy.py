"""Who calls: every request is known by its key before anything else is done with it.

`/v1/...` is for every tenant, by its key; `/{tenant}/v1/...` is the same for that tenant alone, and
is served by the same routes. Whatever is wrong (no key, a wrong or a revoked one, another tenant's,
a tenant that does not exist) is told in the same words and in the same time.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, Protocol

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.openapi import answers
from faasmoe_router.api.stream import ClientGone
from faasmoe_router.api.told import AccountUsage
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import EngineSaturated, HoldQueueFull
from faasmoe_router.tenants.callers import OPEN, Caller, Ticket
from faasmoe_router.tenants.errors import TenantQueueFull

# What machines ask of the process itself. Not for tenants: only /v1 and /{tenant}/v1 are exposed.
PROBES = frozenset({"/health", "/ping", "/version", "/metrics"})
_TENANT_PATH = re.compile(r"/([^/]+)(/v1(?:/.*)?)", re.DOTALL)


class Reception(AbstractAsyncContextManager[Any], Protocol):
    """What lets requests in; runs while the app does."""

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> Ticket:
        """Let a request in; raises RouterError to refuse it."""

    def holding(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Count a request that waits for functions; raises RouterError to refuse it."""

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return what a caller has used; None if nobody counts."""


class Identifies(Protocol):
    """What knows the keys."""

    def identify(self, tenant: str | None, key: str) -> Caller | None:
        """Return who calls with a key, if it is this tenant's; with None, whoever it is."""


class Doorkeeper:
    """ASGI middleware: lets in who has a key, and tells the routes who it is."""

    def __init__(self, app: ASGIApp, *, tenants: Identifies) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        tenant, path = _split(scope["path"])
        caller = self._tenants.identify(tenant, _key(Headers(scope=scope)))
        if caller is None:
            await invalid_api_key().response()(scope, receive, send)
            return
        state = {**scope.get("state", {}), "caller": caller}
        inner = {**scope, "path": path, "raw_path": path.encode(), "state": state}
        await self._app(inner, receive, send)


def caller_of(request: Request) -> Caller:
    """Return who makes a request."""
    caller = getattr(request.state, "caller", OPEN)
    assert isinstance(caller, Caller)
    return caller


def invalid_api_key() -> ApiError:
    """Return the refusal of who cannot be told: the same whatever is wrong with the key."""
    return ApiError(
        "Incorrect API key provided. Send one of your tenant's keys in the header "
        "'Authorization: Bearer KEY'.",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


@contextmanager
def settled_on_error(ticket: Ticket) -> Iterator[None]:
    """Settle a request that was let in, if it ends before anything is generated."""
    try:
        yield
    except (ClientGone, asyncio.CancelledError):
        ticket.end("cancelled")
        raise
    except (EngineSaturated, HoldQueueFull, TenantQueueFull):
        ticket.end("limited")
        raise
    except BaseException:
        ticket.end("failed")
        raise


def usage_routes(reception: Reception) -> APIRouter:
    """Return the route that tells a tenant's account."""
    router = APIRouter()

    @router.get("/v1/usage", response_model=None, responses=answers(AccountUsage, 404, 500))
    async def usage(request: Request) -> dict[str, Any]:
        """Tell what the caller's tenant has used, through all routers."""
        found = reception.usage(caller_of(request))
        if found is None:
            raise ApiError(
                "This router serves no tenants, so it keeps no accounts.",
                status=404,
                code="not_found",
            )
        return found

    return router


def _split(path: str) -> tuple[str | None, str]:
    """Return the tenant that a path names, if it does, and the path without it."""
    if path == "/v1" or path.startswith("/v1/"):
        return None, path
    found = _TENANT_PATH.fullmatch(path)
    return (None, path) if found is None else (found[1], found[2])


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
