"""GET /health, /ping, /version and /metrics: what machines ask of the process."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from faasmoe_router.api.admission import Admission
from faasmoe_router.api.openapi import answers, beside_text
from faasmoe_router.api.told import Status, Version
from faasmoe_router.engine.engine import Engine
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.version import installed_version


def probe_routes(engine: Engine, *, registry: CollectorRegistry, admission: Admission) -> APIRouter:
    """Return the routes that tell of the process."""
    router = APIRouter()

    @router.get("/health", response_model=None, responses=answers(Status, 500, 503))
    async def health() -> dict[str, str]:
        """Tell whether requests can be computed now."""
        if not engine.ready:
            raise EngineUnavailable("the engine does not run")
        if not admission.ready:
            raise EngineUnavailable("no function table was received yet")
        return {"status": "ok"}

    @router.get("/ping", response_model=None, responses=answers(Status, 500))
    async def ping() -> dict[str, str]:
        """Tell that the process lives, whether it can serve or not."""
        return {"status": "ok"}

    @router.get("/version", response_model=None, responses=answers(Version, 500))
    async def tell_version() -> dict[str, Any]:
        """Tell the version of FaaSMoE."""
        return {"version": installed_version()}

    @router.get("/metrics", response_class=PlainTextResponse, responses=beside_text(500))
    async def metrics() -> Response:
        """Tell the metrics to Prometheus."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
