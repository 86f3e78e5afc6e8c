"""The app's OpenAPI: each route says what it answers, errors included, as clients will see it."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from faasmoe_router.api.told import ErrorAnswer, Responses

_WHY: Mapping[int, str] = {
    400: "The request is wrong, or asks for what is not supported; `param` names what.",
    401: "No key, or one that is not in force here.",
    404: "There is no such model, account or path.",
    413: "The body is too large.",
    429: "The tenant's allowance is used up, or too many requests wait.",
    500: "A fault of the server's.",
    501: "The model cannot do this.",
    503: "The server cannot serve this in time: it starts, it ends, or its functions do not come.",
}
_RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_PROBES = ("/health", "/ping", "/version", "/metrics")
_REFERENCE = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}
_KEY = {"type": "http", "scheme": "bearer", "description": "One of the tenant's API keys."}


def errors(*statuses: int) -> Responses:
    """Return these errors as a route's responses."""
    return {status: _error(status) for status in statuses}


def answers(kind: type[BaseModel], *statuses: int, streams: bool = False) -> Responses:
    """Return a route's responses: what it answers with if all is well, and these errors.

    Args:
        kind: what the answer looks like.
        statuses: the errors' statuses.
        streams: whether the answer may be a stream of events instead.
    """
    event = {"text/event-stream": {"schema": {"type": "string"}}}
    good: dict[str, Any] = {"model": kind, **({"content": event} if streams else {})}
    return {200: good, **errors(*statuses)}


def beside_text(*statuses: int) -> Responses:
    """Return these errors as the responses of a route that answers with text if all is well."""
    content = {"application/json": {"schema": _REFERENCE}}
    return {status: {"description": _WHY[status], "content": content} for status in statuses}


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Let the app's OpenAPI say what is answered.

    Args:
        app: the app, all of its routes included.
        has_keys: whether requests need a key.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, has_keys=has_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            # FastAPI's own answer to a body of the wrong shape; ours is a 400.
            operation["responses"].pop("422", None)
            if has_keys and path not in _PROBES:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = beside_text(401)[401]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if has_keys:
        schema["components"]["securitySchemes"] = {"key": _KEY}
    return schema


def _error(status: int) -> dict[str, Any]:
    headers = {"headers": _RETRY} if status in (429, 503) else {}
    return {"model": ErrorAnswer, "description": _WHY[status], **headers}
