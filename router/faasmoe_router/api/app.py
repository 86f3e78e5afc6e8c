"""The FastAPI app: every route and middleware, around one engine.

`create_app` ties the lifetime of the engine, the activator and the tenants to the app's. The small
routes that no other module needs are defined here: health endpoints, which are for probes and need
no API key, and OpenAI endpoints that answer 501.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

import fastapi.routing
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware

from faasmoe_router.api.admission import AlwaysActivated, RequestActivator
from faasmoe_router.api.body import BodyReader
from faasmoe_router.api.body_limits import BodyLimits
from faasmoe_router.api.completions import (
    ChatService,
    ResponseGenerator,
    ServedModel,
    completion_routes,
)
from faasmoe_router.api.content_encoding import ContentEncodingMiddleware, HeadMiddleware
from faasmoe_router.api.documented_routes import add_routes, new_router
from faasmoe_router.api.errors import ApiError, add_error_handlers
from faasmoe_router.api.http_metrics import HttpMetrics, HttpMetricsMiddleware
from faasmoe_router.api.metrics_server import MetricsServer, metrics_routes
from faasmoe_router.api.middleware import AuthMiddleware, RequestContextMiddleware
from faasmoe_router.api.models import model_routes, usage_routes
from faasmoe_router.api.openapi import (
    HealthResponse,
    LoadResponse,
    VersionResponse,
    error_responses,
    install_openapi,
    json_responses,
)
from faasmoe_router.api.preparation import HeldBytes, PreparationQueue
from faasmoe_router.api.preprocessing import Preprocessor
from faasmoe_router.api.prompt_encoding import PromptEncoder
from faasmoe_router.api.refusals import RefusalMetricsMiddleware, refusal_counter
from faasmoe_router.api.request_span import TracingMiddleware
from faasmoe_router.api.resumption import ResumptionMiddleware
from faasmoe_router.api.tokenization import tokenization_routes
from faasmoe_router.api.translated_routes import translated_routes
from faasmoe_router.api.turns import TurnMiddleware
from faasmoe_router.api.validation import MAX_PROMPTS
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import NoTenants, TenantService
from faasmoe_router.version import installed_version
from faasmoe_tracing import NO_TRACER, Tracer

_NOT_IMPLEMENTED_ENDPOINTS: Mapping[str, str] = {
    "/v1/embeddings": "This server's model generates text and does not support embeddings.",
}


def create_app(
    engine: Engine,
    *,
    model_name: str,
    registry: CollectorRegistry,
    activator: RequestActivator | None = None,
    tenancy: TenantService | None = None,
    fingerprint: str | None = None,
    max_body_bytes: int | None = None,
    cors_origins: Sequence[str] = (),
    sampling_defaults: SamplingDefaults | None = None,
    metrics_server: MetricsServer | None = None,
    front_token: str = "",
    tracer: Tracer = NO_TRACER,
) -> FastAPI:
    """Return the app, which starts the engine on startup and stops it on shutdown.

    Args:
        engine: generates text.
        model_name: the name that requests give the model.
        registry: the metrics that /metrics exposes.
        activator: queues requests whose functions are not active; None queues nothing.
        tenancy: authenticates and limits tenants; None serves anyone without a key.
        fingerprint: the `system_fingerprint` of responses, of the weights and their numerics.
        max_body_bytes: larger request bodies are rejected with 413; by default what fits into the
            model's context.
        cors_origins: origins of web pages that may call the API; `*` is any.
        sampling_defaults: values of parameters that a request does not set; None is OpenAI's.
        metrics_server: serves the metrics elsewhere; None serves them at /metrics.
        front_token: what a gateway shows that continues streams; empty without one.
        tracer: traces requests.
    """
    activator = activator or AlwaysActivated()
    tenant_admission = tenancy or NoTenants()
    body_limits = _body_limits(engine, max_body_bytes)
    queue = PreparationQueue(is_shared=tenancy is not None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with activator, engine, tenant_admission, queue, metrics_server or nullcontext():
            yield

    _skip_endpoint_sources()
    app = FastAPI(title="FaaSMoE router", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    _add_middleware(
        app,
        max_body_bytes=body_limits.max_bytes,
        tenancy=tenancy,
        registry=registry,
        cors_origins=cors_origins,
        front_token=front_token,
        tracer=tracer,
    )
    add_error_handlers(app)
    generator = ResponseGenerator(
        engine,
        served_model=ServedModel(model_name, fingerprint),
        activator=activator,
        tenant_admission=tenant_admission,
    )
    bodies = BodyReader(body_limits, queue, HeldBytes())
    defaults = sampling_defaults or SamplingDefaults()
    routers = (
        *_generation_routes(engine, generator, bodies, queue, defaults, model_name),
        model_routes(model_name=model_name, max_model_len=engine.limits.max_model_len),
        usage_routes(tenant_admission),
        not_implemented_routes(),
        health_routes(engine, activator=activator),
        *(() if metrics_server is not None else (metrics_routes(registry),)),
    )
    add_routes(app, routers)
    install_openapi(app, requires_api_key=tenancy is not None)
    return app


def _skip_endpoint_sources() -> None:
    """Keep FastAPI from reading an endpoint's source at its first request, which takes 5 ms.

    It would name the source's place in messages that `add_error_handlers` replaces.
    """
    if hasattr(fastapi.routing, "_extract_endpoint_context"):
        fastapi.routing._extract_endpoint_context = lambda func: {}


def _generation_routes(
    engine: Engine,
    generator: ResponseGenerator,
    bodies: BodyReader,
    queue: PreparationQueue,
    sampling_defaults: SamplingDefaults,
    model_name: str,
) -> tuple[APIRouter, ...]:
    """Return the routes whose bodies have prompts or tokens."""
    encoder = PromptEncoder(engine, queue)
    preprocessor = Preprocessor(engine, queue, encoder, sampling_defaults)
    chats = ChatService(engine, generator, preprocessor, bodies)
    return (
        completion_routes(engine, generator, preprocessor, chats, bodies),
        translated_routes(chats),
        tokenization_routes(engine, model_name=model_name, bodies=bodies, encoder=encoder),
    )


def _body_limits(engine: Engine, max_body_bytes: int | None) -> BodyLimits:
    """Return the limits of bodies: what fits into the model's context, or `max_body_bytes`."""
    limits = BodyLimits.for_model(
        max_model_len=engine.limits.max_model_len,
        max_token_bytes=engine.tokenizer.max_token_bytes,
        max_prompts=MAX_PROMPTS,
    )
    return limits if max_body_bytes is None else replace(limits, max_bytes=max_body_bytes)


def _add_middleware(
    app: FastAPI,
    *,
    max_body_bytes: int,
    tenancy: TenantService | None,
    registry: CollectorRegistry,
    cors_origins: Sequence[str],
    front_token: str,
    tracer: Tracer,
) -> None:
    """Add all middleware; the last one added is the outermost."""
    app.add_middleware(ContentEncodingMiddleware, max_body_bytes=max_body_bytes)
    app.add_middleware(HeadMiddleware)
    if tenancy is not None:
        app.add_middleware(TurnMiddleware)
        app.add_middleware(AuthMiddleware, authenticator=tenancy)
    app.add_middleware(RequestContextMiddleware, max_body_bytes=max_body_bytes)
    if tracer.is_enabled:
        app.add_middleware(TracingMiddleware, tracer=tracer)
    app.add_middleware(RefusalMetricsMiddleware, counter=refusal_counter(registry))
    app.add_middleware(HttpMetricsMiddleware, metrics=HttpMetrics(registry), routes=app.routes)
    app.add_middleware(ResumptionMiddleware, front_token=front_token)
    if cors_origins:
        _add_cors(app, cors_origins)  # covers errors and needs no API key


def _add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["*"],
    )


def health_routes(engine: Engine, *, activator: RequestActivator) -> APIRouter:
    """Return the routes for probes."""
    router = new_router()

    @router.get("/health", response_model=None, responses=json_responses(HealthResponse, 500, 503))
    async def health() -> dict[str, str]:
        """Readiness: 200 if requests can be served now."""
        if not engine.is_ready:
            raise EngineUnavailable("the engine is not running")
        if not activator.ready:
            raise EngineUnavailable("no routing table has been received yet")
        return {"status": "ok"}

    @router.get("/ping", response_model=None, responses=json_responses(HealthResponse, 500))
    async def ping() -> dict[str, str]:
        """Liveness: 200 while the process responds, ready or not."""
        return {"status": "ok"}

    @router.get("/load", response_model=None, responses=json_responses(LoadResponse, 500))
    async def load() -> dict[str, int]:
        """Return the number of sequences that run or wait, as vLLM's `/load` does."""
        return {"server_load": sum(engine.request_counts())}

    @router.get("/version", response_model=None, responses=json_responses(VersionResponse, 500))
    async def show_version() -> dict[str, Any]:
        """Return the version of FaaSMoE."""
        return {"version": installed_version()}

    return router


def not_implemented_routes() -> APIRouter:
    """Return OpenAI's endpoints that this server does not implement; each answers 501."""
    router = new_router()
    for path, reason in _NOT_IMPLEMENTED_ENDPOINTS.items():
        _add_not_implemented(router, path, reason)
    return router


def _add_not_implemented(router: APIRouter, path: str, reason: str) -> None:
    name = f"not_implemented_{path[4:]}"
    error_docs = error_responses(413, 500, 501, 503)

    @router.post(path, status_code=501, name=path, operation_id=name, responses=error_docs)
    async def not_implemented() -> None:
        """Not implemented."""
        raise ApiError(reason, status=501, error_type="server_error", code="not_implemented")
