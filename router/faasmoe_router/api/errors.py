"""Errors as OpenAI's API tells them: every answer that is not a success has this one shape."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from faasmoe_router.errors import (
    ActivationQueueFull,
    ActivationTimeout,
    EngineQueueFull,
    EngineUnavailable,
    GenerationFailed,
    NoTokenAllowed,
    RateLimitExceeded,
    RequestTooLarge,
    RouterError,
    StoreCorrupted,
    TenantQueueFull,
)

RETRY_AFTER_S = 1
MAX_QUOTED_INPUT_LENGTH = 80

# Router errors that reach the API: status, type, code.
_ROUTER_ERROR_RESPONSES: Mapping[type[RouterError], tuple[int, str, str]] = {
    EngineQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    ActivationQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    TenantQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    RateLimitExceeded: (429, "rate_limit_error", "rate_limit_exceeded"),
    RequestTooLarge: (400, "invalid_request_error", "invalid_value"),
    ActivationTimeout: (503, "server_error", "service_unavailable"),
    StoreCorrupted: (503, "server_error", "model_damaged"),
    EngineUnavailable: (503, "server_error", "service_unavailable"),
    NoTokenAllowed: (400, "invalid_request_error", "invalid_value"),  # before its base
    GenerationFailed: (500, "server_error", "internal_error"),
}

_HTTP_ERROR_CODES: Mapping[int, str] = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
}


class ApiError(Exception):
    """A refusal, ready to be told."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        error_type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that tells it."""
        return error_body(str(self), error_type=self.error_type, param=self.param, code=self.code)

    def response(self) -> JSONResponse:
        """The HTTP response that tells it."""
        headers = {**self._default_retry_headers(), **self.headers}
        return JSONResponse(self.body, status_code=self.status, headers=headers)

    def _default_retry_headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        # OpenAI's client would try again after any status from 500.
        return {"X-Should-Retry": "false"} if self.status == 501 else {}


def error_body(
    message: str, *, error_type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def internal_error() -> ApiError:
    """Return what a client is told of a fault of ours: that it was one, and no more."""
    return ApiError(
        "The server had an error while processing your request.",
        status=500,
        error_type="server_error",
        code="internal_error",
    )


def from_router_error(error: RouterError) -> ApiError:
    """Return what a client is told of an error of the router."""
    for error_class, (status, error_type, code) in _ROUTER_ERROR_RESPONSES.items():
        if isinstance(error, error_class):
            headers = _rate_limit_headers(error) if isinstance(error, RateLimitExceeded) else {}
            return ApiError(
                str(error), status=status, error_type=error_type, code=code, headers=headers
            )
    return internal_error()


def _rate_limit_headers(error: RateLimitExceeded) -> dict[str, str]:
    return {**error.headers, "Retry-After": str(max(1, math.ceil(error.retry_after_s)))}


def model_not_found(name: str) -> ApiError:
    """Return the refusal of a model that is not served here."""
    return ApiError(
        f"The model `{quote_input(name)}` does not exist.",
        status=404,
        param="model",
        code="model_not_found",
    )


def from_validation_errors(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the refusal of a body that does not have the right shape: its first fault."""
    first = errors[0]
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "not JSON")
        return _invalid_json(f"{detail} at character {first['loc'][-1]}")
    param = param_path(first["loc"][1:])
    if param is None:
        return ApiError(
            "The body of your request must be a JSON object, sent with the header "
            "'Content-Type: application/json'.",
            code="invalid_type",
        )
    if first["type"] == "missing":
        return ApiError(
            f"Missing required parameter: '{param}'.",
            param=param,
            code="missing_required_parameter",
        )
    kind = "type" if first["type"].endswith(("_type", "_unicode")) else "value"
    return ApiError(
        f"Invalid {kind} for '{param}': {first['msg']}, got {_quote_json(first['input'])}.",
        param=param,
        code=f"invalid_{kind}",
    )


def param_path(loc: Iterable[str | int]) -> str | None:
    """Return a field's path as OpenAI writes it, such as messages[0].content."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def quote_input(text: str) -> str:
    """Return a text as it may be shown in a message: short, on one line, of whole characters."""
    short = text[:MAX_QUOTED_INPUT_LENGTH]
    printable = "".join(c if c.isprintable() else _escape_character(c) for c in short)
    return printable if short == text else printable + "..."


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _quote_json(value: object) -> str:
    """Return a field's value as the client wrote it, so that "4" is told from 4."""
    try:
        return quote_input(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return "a value that is nested too deeply"


def _invalid_json(reason: str) -> ApiError:
    return ApiError(
        f"We could not parse the JSON body of your request: {reason}.", code="invalid_json"
    )


def _from_json_parse_error(error: BaseException) -> ApiError:
    """Return the refusal of a body that the JSON parser gave up on, by what it gave up with."""
    if isinstance(error, RecursionError):
        return _invalid_json("it is nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return _invalid_json(f"got byte 0x{byte:02x} at position {error.start}, expected UTF-8")
    if isinstance(error, ValueError):
        return _invalid_json(f"a number has more than {sys.get_int_max_str_digits()} digits")
    return _invalid_json("it could not be read")


def add_error_handlers(app: FastAPI) -> None:
    """Make the app tell every error in OpenAI's shape."""

    async def handle_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def handle_router_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RouterError)
        return from_router_error(error).response()

    async def handle_validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation_errors(error.errors()).response()

    async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _from_http_exception(request, error).response()

    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(RouterError, handle_router_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 400 and error.__cause__ is not None:
        return _from_json_parse_error(error.__cause__)
    url = quote_input(f"{request.method} {request.url.path}")
    messages = {
        404: f"Unknown request URL: {url}.",
        405: f"Not allowed: {url}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = _HTTP_ERROR_CODES.get(error.status_code)
    return ApiError(message, status=error.status_code, code=code)
