"""GET /v1/models and GET /v1/models/{id}: the one model that is served here, by its names."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from faasmoe_router.api.auth import get_caller
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.openapi import ModelCard, ModelList, json_responses
from faasmoe_router.tenants.caller import Caller


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that is served.

    Attributes:
        name: what requests call it.
        fingerprint: tells its weights, and what they are computed with, from all others; None
            where they are not known.
    """

    name: str
    fingerprint: str | None = None

    @property
    def extra_fields(self) -> Mapping[str, str]:
        """What every answer of it says."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}


def model_routes(*, model_name: str, max_model_len: int) -> APIRouter:
    """Return the routes that describe the model."""
    router = APIRouter()
    created_s = int(time.time())

    def model_card(name: str, caller: Caller) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created_s,
            "owned_by": "faasmoe",
            "root": model_name,
            "parent": None,
            "max_model_len": caller.effective_max_model_len(max_model_len),
        }

    @router.get("/v1/models", response_model=None, responses=json_responses(ModelList, 500))
    async def list_models(request: Request) -> dict[str, Any]:
        """List the names that the caller may call the model."""
        caller = get_caller(request)
        names = caller.model_names(model_name)
        return {"object": "list", "data": [model_card(name, caller) for name in names]}

    @router.get(
        "/v1/models/{model_id:path}",
        response_model=None,
        responses=json_responses(ModelCard, 404, 500),
    )
    async def get_model(model_id: str, request: Request) -> dict[str, Any]:
        """Describe the model by one of its names."""
        caller = get_caller(request)
        if model_id not in caller.model_names(model_name):
            raise model_not_found(model_id)
        return model_card(model_id, caller)

    return router
