"""Endpoints of OpenAI's that are known and not served: each says so, with what to use instead."""

from collections.abc import Mapping

from fastapi import APIRouter

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.openapi import errors

_WHY: Mapping[str, str] = {
    "/v1/embeddings": "This server's model generates text and makes no embeddings.",
    "/v1/responses": "This server has no Responses API; use /v1/chat/completions.",
}


def unserved_routes() -> APIRouter:
    """Return the routes that refuse."""
    router = APIRouter()
    for path, why in _WHY.items():
        _add(router, path, why)
    return router


def _add(router: APIRouter, path: str, why: str) -> None:
    name = f"unserved_{path[4:]}"
    refusals = errors(413, 500, 501, 503)

    @router.post(path, status_code=501, name=path, operation_id=name, responses=refusals)
    async def refuse() -> None:
        """Refuse: this endpoint is not served."""
        raise ApiError(why, status=501, kind="server_error", code="not_implemented")
