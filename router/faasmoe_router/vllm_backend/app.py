"""The ASGI app of a router with vLLM: our tenants and probes around vLLM's own OpenAI app."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from faasmoe_router.api.admission import RequestActivator, TenantAdmission
from faasmoe_router.api.content_encoding import ContentEncodingMiddleware, HeadMiddleware
from faasmoe_router.api.documented_routes import documented_routes
from faasmoe_router.api.errors import add_error_handlers
from faasmoe_router.api.metrics_server import metrics_routes
from faasmoe_router.api.middleware import AuthMiddleware, RequestContextMiddleware
from faasmoe_router.api.models import model_routes, usage_routes
from faasmoe_router.api.refusals import RefusalMetricsMiddleware, refusal_counter
from faasmoe_router.api.request_span import TracingMiddleware
from faasmoe_router.api.resumption import ResumptionMiddleware
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import TenantService
from faasmoe_router.version import installed_version
from faasmoe_router.vllm_backend.engine_client import TenantEngine
from faasmoe_tracing import Tracer

MAX_BODY_BYTES = 16 << 20


class EngineState:
    """The engine and vLLM's app, once they have started.

    Attributes:
        engine: the engine; None before.
        app: vLLM's app behind the tenants' middleware; None before.
    """

    def __init__(self) -> None:
        self.engine: TenantEngine | None = None
        self.app: ASGIApp | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests can be computed now."""
        return self.engine is not None and self.app is not None and not self.engine.errored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request by vLLM's app; raises EngineUnavailable before it has started."""
        if self.app is None:
            raise EngineUnavailable("the engine is starting")
        await self.app(scope, receive, send)


def create_app(
    state: EngineState,
    lifespan: Lifespan[FastAPI],
    *,
    model_name: str,
    max_model_len: int,
    registry: CollectorRegistry,
    activator: RequestActivator,
    admission: TenantAdmission,
    tenancy: TenantService | None,
    cors_origins: Sequence[str],
    front_token: str,
    serves_metrics: bool,
    tracer: Tracer,
) -> FastAPI:
    """Return the app.

    Args:
        state: the engine, which `lifespan` starts.
        lifespan: runs the engine and everything beside it.
        model_name: the model's own name.
        max_model_len: the engine's context length.
        registry: metrics, and of refusals too from here on.
        activator: queues requests whose functions are not active.
        admission: the tenants' limits.
        tenancy: authenticates tenants; None serves anyone.
        cors_origins: origins of web pages that may call the API.
        front_token: what a gateway shows; empty without one.
        serves_metrics: whether /metrics is served here.
        tracer: traces requests.
    """
    app = FastAPI(title="FaaSMoE router (vLLM)", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(ContentEncodingMiddleware, max_body_bytes=MAX_BODY_BYTES)
    app.add_middleware(HeadMiddleware)
    if tenancy is not None:
        app.add_middleware(AuthMiddleware, authenticator=tenancy)
    app.add_middleware(RequestContextMiddleware, max_body_bytes=MAX_BODY_BYTES)
    if tracer.is_enabled:
        app.add_middleware(TracingMiddleware, tracer=tracer)
    app.add_middleware(RefusalMetricsMiddleware, counter=refusal_counter(registry))
    app.add_middleware(ResumptionMiddleware, front_token=front_token)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    add_error_handlers(app)
    app.include_router(_probe_routes(state, activator))
    if serves_metrics:
        app.include_router(metrics_routes(registry))
    models = model_routes(model_name=model_name, max_model_len=max_model_len)
    for router in (models, usage_routes(admission)):
        app.router.routes.extend(documented_routes(router.routes))
    app.mount("/", state)
    return app


def _probe_routes(state: EngineState, activator: RequestActivator) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Readiness: 200 if requests can be served now."""
        if not state.is_ready:
            raise EngineUnavailable("the engine is not running")
        if not activator.ready:
            raise EngineUnavailable("no routing table has been received yet")
        return {"status": "ok"}

    @router.get("/ping")
    async def ping() -> dict[str, str]:
        """Liveness: 200 while the process responds, ready or not."""
        return {"status": "ok"}

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Return the number of requests that run or wait."""
        return {"server_load": 0 if state.engine is None else state.engine.gate.n_requests}

    @router.get("/version")
    async def version() -> dict[str, Any]:
        """Return the version of FaaSMoE."""
        return {"version": installed_version()}

    return router
