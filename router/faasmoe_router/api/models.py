"""GET /v1/models and GET /v1/models/{id}: the one model that is served here, by its names."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.openapi import answers
from faasmoe_router.api.tenancy import caller_of
from faasmoe_router.api.told import ModelCard, ModelList
from faasmoe_router.tenants.callers import Caller


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
    def told(self) -> Mapping[str, str]:
        """What every answer of it says."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}


def model_routes(*, model_name: str, max_model_len: int) -> APIRouter:
    """Return the routes that describe the model."""
    router = APIRouter()
    created_s = int(time.time())

    def model(name: str, caller: Caller) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created_s,
            "owned_by": "faasmoe",
            "root": model_name,
            "parent": None,
            "max_model_len": caller.context_of(max_model_len),
        }

    @router.get("/v1/models", response_model=None, responses=answers(ModelList, 500))
    async def list_models(request: Request) -> dict[str, Any]:
        """List the names that the caller may call the model."""
        caller = caller_of(request)
        names = caller.model_names(model_name)
        return {"object": "list", "data": [model(name, caller) for name in names]}

    @router.get(
        "/v1/models/{model_id:path}", response_model=None, responses=answers(ModelCard, 404, 500)
    )
    async def get_model(model_id: str, request: Request) -> dict[str, Any]:
        """Describe the model by one of its names."""
        caller = caller_of(request)
        if model_id not in caller.model_names(model_name):
            raise model_not_found(model_id)
        return model(model_id, caller)

    return router
