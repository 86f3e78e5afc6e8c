"""GET /v1/models and GET /v1/models/{id}: the one model that is served here."""

import time
from typing import Any

from fastapi import APIRouter

from faasmoe_router.api.errors import model_not_found


def model_routes(*, model_name: str, max_model_len: int) -> APIRouter:
    """Return the routes that describe the model."""
    router = APIRouter()
    model = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "faasmoe",
        "root": model_name,
        "parent": None,
        "max_model_len": max_model_len,
    }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        """Describe one model."""
        if model_id != model_name:
            raise model_not_found(model_id)
        return model

    return router
