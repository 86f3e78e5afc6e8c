"""GET /v1/models, /v1/models/{id} and /v1/usage: the served model, and a tenant's usage of it."""

import time
from typing import Any

from fastapi import APIRouter, Request

from faasmoe_router.api.admission import TenantAdmission
from faasmoe_router.api.documented_routes import new_router
from faasmoe_router.api.errors import ApiError, model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import (
    ModelCard,
    ModelList,
    TenantUsageResponse,
    json_responses,
)
from faasmoe_router.tenants.service import Caller


def model_routes(*, model_name: str, max_model_len: int) -> APIRouter:
    """Return the routes that describe the model.

    Args:
        model_name: the model's own name; a tenant may have an alias for it.
        max_model_len: the engine's context length in tokens; a tenant's may be shorter.
    """
    router = new_router()
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
        """List the model under each name that the caller may use."""
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


def usage_routes(tenant_admission: TenantAdmission) -> APIRouter:
    """Return the route that reports a tenant's usage."""
    router = new_router()

    @router.get(
        "/v1/usage", response_model=None, responses=json_responses(TenantUsageResponse, 404, 500)
    )
    async def get_usage(request: Request) -> dict[str, Any]:
        """Return the usage of the caller's tenant, summed over all routers."""
        tenant_usage = tenant_admission.usage(get_caller(request))
        if tenant_usage is None:
            raise ApiError(
                "Usage is not recorded: this router has no tenants.",
                status=404,
                code="not_found",
            )
        return tenant_usage

    return router
