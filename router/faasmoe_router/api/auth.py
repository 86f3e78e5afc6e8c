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
from faasmoe_router.api.openapi import TenantUsageResponse, json_responses
from faasmoe_router.api.streaming import ClientDisconnected
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import ActivationQueueFull, EngineQueueFull, TenantQueueFull
from faasmoe_router.tenants.caller import ANONYMOUS, Caller, UsageRecorder

# What machines ask of the process itself. Not for tenants: only /v1 and /{tenant}/v1 are exposed.
UNAUTHENTICATED_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
_TENANT_PATH_PATTERN = re.compile(r"/([^/]+)(/v1(?:/.*)?)", re.DOTALL)


class TenantAdmission(AbstractAsyncContextManager[Any], Protocol):
    """What lets requests in; runs while the app does."""

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> UsageRecorder:
        """Let a request in; raises RouterError to refuse it."""

    def queue_slot(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Count a request that waits for functions; raises RouterError to refuse it."""

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return what a caller has used; None if nobody counts."""


class Authenticator(Protocol):
    """What knows the keys."""

    def authenticate(self, tenant: str | None, api_key: str) -> Caller | None:
        """Return who calls with a key, if it is this tenant's; with None, whoever it is."""


class AuthMiddleware:
    """ASGI middleware: lets in who has a key, and tells the routes who it is."""

    def __init__(self, app: ASGIApp, *, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in UNAUTHENTICATED_PATHS:
            await self._app(scope, receive, send)
            return
        tenant, path = _split_tenant_path(scope["path"])
        caller = self._authenticator.authenticate(tenant, _bearer_token(Headers(scope=scope)))
        if caller is None:
            await invalid_api_key().response()(scope, receive, send)
            return
        state = {**scope.get("state", {}), "caller": caller}
        tenant_scope = {**scope, "path": path, "raw_path": path.encode(), "state": state}
        await self._app(tenant_scope, receive, send)


def get_caller(request: Request) -> Caller:
    """Return who makes a request."""
    caller = getattr(request.state, "caller", ANONYMOUS)
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
def record_outcome_on_error(usage_recorder: UsageRecorder) -> Iterator[None]:
    """Settle a request that was let in, if it ends before anything is generated."""
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


def usage_routes(tenant_admission: TenantAdmission) -> APIRouter:
    """Return the route that tells a tenant's account."""
    router = APIRouter()

    @router.get(
        "/v1/usage", response_model=None, responses=json_responses(TenantUsageResponse, 404, 500)
    )
    async def get_usage(request: Request) -> dict[str, Any]:
        """Tell what the caller's tenant has used, through all routers."""
        tenant_usage = tenant_admission.usage(get_caller(request))
        if tenant_usage is None:
            raise ApiError(
                "Usage is not recorded: this router has no tenants.",
                status=404,
                code="not_found",
            )
        return tenant_usage

    return router


def _split_tenant_path(path: str) -> tuple[str | None, str]:
    """Return the tenant that a path names, if it does, and the path without it."""
    if path == "/v1" or path.startswith("/v1/"):
        return None, path
    match = _TENANT_PATH_PATTERN.fullmatch(path)
    return (None, path) if match is None else (match[1], match[2])


def _bearer_token(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
