"""Endpoints of OpenAI's that are known and not served: each says so, with what to use instead.

GET /health, /ping, /version and /metrics: what machines ask of the process.

The FastAPI app: the routes put together, around an engine that lives as long as the app.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from faasmoe_router.api.activation import AlwaysActivated, RequestActivator
from faasmoe_router.api.auth import AuthMiddleware, usage_routes
from faasmoe_router.api.completions import completion_routes
from faasmoe_router.api.errors import ApiError, add_error_handlers
from faasmoe_router.api.middleware import RequestContextMiddleware
from faasmoe_router.api.models import ServedModel, model_routes
from faasmoe_router.api.openapi import (
    HealthResponse,
    VersionResponse,
    error_responses,
    install_openapi,
    json_responses,
    text_error_responses,
)
from faasmoe_router.api.tokenization import tokenization_routes
from faasmoe_router.engine.engine import Engine
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import NoTenants, TenantService
from faasmoe_router.version import installed_version

_NOT_IMPLEMENTED_ENDPOINTS: Mapping[str, str] = {
    "/v1/embeddings": "This server's model generates text and does not support embeddings.",
    "/v1/responses": "This server has no Responses API; use /v1/chat/completions.",
}


def not_implemented_routes() -> APIRouter:
    """Return the routes that refuse."""
    router = APIRouter()
    for path, reason in _NOT_IMPLEMENTED_ENDPOINTS.items():
        _add_not_implemented(router, path, reason)
    return router


def _add_not_implemented(router: APIRouter, path: str, reason: str) -> None:
    name = f"not_implemented_{path[4:]}"
    error_docs = error_responses(413, 500, 501, 503)

    @router.post(path, status_code=501, name=path, operation_id=name, responses=error_docs)
    async def not_implemented() -> None:
        """Refuse: this endpoint is not served."""
        raise ApiError(reason, status=501, error_type="server_error", code="not_implemented")


def health_routes(
    engine: Engine, *, registry: CollectorRegistry, activator: RequestActivator
) -> APIRouter:
    """Return the routes that tell of the process."""
    router = APIRouter()

    @router.get("/health", response_model=None, responses=json_responses(HealthResponse, 500, 503))
    async def health() -> dict[str, str]:
        """Tell whether requests can be computed now."""
        if not engine.is_ready:
            raise EngineUnavailable("the engine is not running")
        if not activator.ready:
            raise EngineUnavailable("no routing table has been received yet")
        return {"status": "ok"}

    @router.get("/ping", response_model=None, responses=json_responses(HealthResponse, 500))
    async def ping() -> dict[str, str]:
        """Tell that the process lives, whether it can serve or not."""
        return {"status": "ok"}

    @router.get("/version", response_model=None, responses=json_responses(VersionResponse, 500))
    async def show_version() -> dict[str, Any]:
        """Tell the version of FaaSMoE."""
        return {"version": installed_version()}

    @router.get("/metrics", response_class=PlainTextResponse, responses=text_error_responses(500))
    async def metrics() -> Response:
        """Tell the metrics to Prometheus."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


MAX_BODY_BYTES = 8 << 20


def create_app(
    engine: Engine,
    *,
    model_name: str,
    registry: CollectorRegistry,
    activator: RequestActivator | None = None,
    tenancy: TenantService | None = None,
    fingerprint: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the app; it starts the engine when it starts and stops it when it ends.

    Args:
        engine: what generates.
        model_name: what requests call the model.
        registry: where /metrics reads.
        activator: what may queue requests; runs as long as the engine. By default nothing does.
        tenancy: the tenants; without them whoever reaches the router may call.
        fingerprint: tells the model's weights, and what they are computed with, from all others.
        max_body_bytes: larger bodies are refused.
    """
    activator = activator or AlwaysActivated()
    tenant_admission = tenancy or NoTenants()
    served_model = ServedModel(model_name, fingerprint)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with activator, engine, tenant_admission:
            yield

    app = FastAPI(title="FaaSMoE router", lifespan=lifespan, docs_url=None, redoc_url=None)
    if tenancy is not None:
        app.add_middleware(AuthMiddleware, authenticator=tenancy)
    app.add_middleware(RequestContextMiddleware, max_body_bytes=max_body_bytes)
    add_error_handlers(app)
    app.include_router(
        completion_routes(
            engine,
            served_model=served_model,
            activator=activator,
            tenant_admission=tenant_admission,
        )
    )
    app.include_router(
        model_routes(model_name=model_name, max_model_len=engine.limits.max_model_len)
    )
    app.include_router(usage_routes(tenant_admission))
    app.include_router(tokenization_routes(engine, model_name=model_name))
    app.include_router(not_implemented_routes())
    app.include_router(health_routes(engine, registry=registry, activator=activator))
    install_openapi(app, requires_api_key=tenancy is not None)
    return app
