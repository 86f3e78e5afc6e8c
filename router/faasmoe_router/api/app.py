"""The FastAPI app: the routes put together, around an engine that lives as long as the app."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from faasmoe_router.api.admission import Admission, OpenAdmission
from faasmoe_router.api.completions import completion_routes
from faasmoe_router.api.envelope import Envelope
from faasmoe_router.api.errors import add_error_handlers
from faasmoe_router.api.models import ServedModel, model_routes
from faasmoe_router.api.openapi import describe
from faasmoe_router.api.probes import probe_routes
from faasmoe_router.api.tenancy import Doorkeeper, usage_routes
from faasmoe_router.api.tokens import token_routes
from faasmoe_router.api.unserved import unserved_routes
from faasmoe_router.engine.engine import Engine
from faasmoe_router.tenants.open import OpenTenancy
from faasmoe_router.tenants.tenancy import Tenancy

MAX_BODY_BYTES = 8 << 20


def create_app(
    engine: Engine,
    *,
    model_name: str,
    registry: CollectorRegistry,
    admission: Admission | None = None,
    tenancy: Tenancy | None = None,
    fingerprint: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the app; it starts the engine when it starts and stops it when it ends.

    Args:
        engine: what generates.
        model_name: what requests call the model.
        registry: where /metrics reads.
        admission: what may hold requests; runs as long as the engine. By default nothing does.
        tenancy: the tenants; without them whoever reaches the router may call.
        fingerprint: tells the model's weights, and what they are computed with, from all others.
        max_body_bytes: larger bodies are refused.
    """
    admission = admission or OpenAdmission()
    reception = tenancy or OpenTenancy()
    served = ServedModel(model_name, fingerprint)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with admission, engine, reception:
            yield

    app = FastAPI(title="FaaSMoE router", lifespan=lifespan, docs_url=None, redoc_url=None)
    if tenancy is not None:
        app.add_middleware(Doorkeeper, tenants=tenancy)
    app.add_middleware(Envelope, max_body_bytes=max_body_bytes)
    add_error_handlers(app)
    app.include_router(
        completion_routes(engine, served=served, admission=admission, reception=reception)
    )
    app.include_router(
        model_routes(model_name=model_name, max_model_len=engine.limits.max_model_len)
    )
    app.include_router(usage_routes(reception))
    app.include_router(token_routes(engine, model_name=model_name))
    app.include_router(unserved_routes())
    app.include_router(probe_routes(engine, registry=registry, admission=admission))
    describe(app, has_keys=tenancy is not None)
    return app
