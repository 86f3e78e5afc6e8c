"""OpenAI-shaped error responses.

Every unsuccessful response has the body `{"error": {"message", "type", "param", "code"}}`. This
module maps the router's exceptions, FastAPI's validation errors and Starlette's HTTP exceptions to
it, and quotes client input safely. Messages name the field, what it got and what it expected.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from faasmoe_router.api.refusals import set_refusal_reason
from faasmoe_router.errors import (
    ActivationQueueFull,
    ActivationTimeout,
    EngineQueueFull,
    EngineUnavailable,
    GenerationFailed,
    ModelPartUnavailable,
    NoTokenAllowed,
    QueueFull,
    RateLimitExceeded,
    RequestTooLarge,
    RouterError,
    StoreCorrupted,
    TenantQueueFull,
)

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; seen by middleware only
MAX_QUOTED_INPUT_LENGTH = 80
_QUOTING_ENCODER = json.JSONEncoder(ensure_ascii=False)

# Router errors that reach clients: HTTP status, type, code. The first matching class wins.
_ROUTER_ERROR_RESPONSES: Mapping[type[RouterError], tuple[int, str, str]] = {
    EngineQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    ActivationQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    TenantQueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    RateLimitExceeded: (429, "rate_limit_error", "rate_limit_exceeded"),
    RequestTooLarge: (400, "invalid_request_error", "invalid_value"),
    ActivationTimeout: (503, "server_error", "service_unavailable"),
    StoreCorrupted: (503, "server_error", "model_damaged"),
    EngineUnavailable: (503, "server_error", "service_unavailable"),
    ModelPartUnavailable: (503, "server_error", "service_unavailable"),  # before its base class
    NoTokenAllowed: (400, "invalid_request_error", "invalid_value"),  # before its base class
    GenerationFailed: (500, "server_error", "internal_error"),
}

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_HTTP_ERROR_CODES: Mapping[int, str] = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
}


class ClientDisconnected(Exception):
    """The client hung up before its response was ready."""


class ApiError(Exception):
    """An error response to the client.

    Attributes:
        status: the HTTP status.
        error_type: OpenAI's `type`.
        param: the path of the offending field, such as `messages[0].content`.
        code: OpenAI's `code`.
        headers: additional response headers.
    """

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
        """The JSON body of the response."""
        return {
            "error": {
                "message": str(self),
                "type": self.error_type,
                "param": self.param,
                "code": self.code,
            }
        }

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """Return this error with other names of fields, those of the API that was called."""
        pattern = re.compile(rf"\b(?:{'|'.join(names)})\b")

        def rename(text: str) -> str:
            return pattern.sub(lambda match: names[match[0]], text)

        return ApiError(
            rename(str(self)),
            status=self.status,
            error_type=self.error_type,
            param=None if self.param is None else rename(self.param),
            code=self.code,
            headers=self.headers,
        )

    def response(self) -> JSONResponse:
        """Return the HTTP response, with retry headers that fit its status."""
        headers = {**self._default_retry_headers(), **self.headers}
        return JSONResponse(self.body, status_code=self.status, headers=headers)

    def _default_retry_headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        # OpenAI's client retries every status >= 500; a retry cannot succeed here.
        return {"X-Should-Retry": "false"} if self.status == 501 else {}


def internal_error() -> ApiError:
    """Return the error for an unexpected failure; it reveals no internals."""
    return ApiError(
        "The server had an error while processing your request.",
        status=500,
        error_type="server_error",
        code="internal_error",
    )


def from_router_error(error: RouterError) -> ApiError:
    """Return the API error of a router error; an unmapped one becomes an internal error."""
    for error_class, (status, error_type, code) in _ROUTER_ERROR_RESPONSES.items():
        if isinstance(error, error_class):
            headers: dict[str, str] = {}
            if isinstance(error, RateLimitExceeded):
                headers = _rate_limit_headers(error)
            elif isinstance(error, QueueFull):
                headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(
                str(error), status=status, error_type=error_type, code=code, headers=headers
            )
    return internal_error()


def _rate_limit_headers(error: RateLimitExceeded) -> dict[str, str]:
    return {**error.headers, "Retry-After": str(max(1, math.ceil(error.retry_after_s)))}


def invalid_value(param: str, reason: str) -> ApiError:
    """Return the error for a field whose value is not acceptable."""
    return ApiError(f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")


def unsupported_param(param: str, reason: str = "is not supported by this server") -> ApiError:
    """Return the error for a known parameter that cannot be honoured."""
    return ApiError(
        f"Unsupported parameter: '{param}' {reason}.", param=param, code="unsupported_parameter"
    )


def missing_param(param: str) -> ApiError:
    """Return the error for a required field that is absent."""
    return ApiError(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def body_too_large(max_bytes: int) -> ApiError:
    """Return the error for a request body above the limit."""
    return ApiError(
        f"The request body is too large: expected at most {max_bytes} bytes.",
        status=413,
        code="request_too_large",
    )


def model_not_found(name: str) -> ApiError:
    """Return the error for a model name that this server does not serve."""
    return ApiError(
        f"The model `{quote_input(name)}` does not exist.",
        status=404,
        param="model",
        code="model_not_found",
    )


def from_validation_errors(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the API error of the first of pydantic's validation errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "not JSON")
        return invalid_json(f"{detail} at character {first['loc'][-1]}")
    param = param_path(first["loc"][1:])
    if param is None:
        return not_an_object()
    if first["type"] == "missing":
        return missing_param(param)
    fault = "type" if first["type"].endswith(("_type", "_unicode")) else "value"
    return ApiError(
        f"Invalid {fault} for '{param}': {first['msg']}, got {_quote_json(first['input'])}.",
        param=param,
        code=f"invalid_{fault}",
    )


def not_an_object() -> ApiError:
    """Return the error for a body that is not a JSON object, or not declared as one."""
    return ApiError(
        "The body of your request must be a JSON object, sent with the header "
        "'Content-Type: application/json'.",
        code="invalid_type",
    )


def param_path(loc: Iterable[str | int]) -> str | None:
    """Return a field's path in OpenAI's notation, such as messages[0].content."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def quote_input(text: str) -> str:
    """Return client input for a message: truncated to 80 characters, unprintable ones escaped."""
    truncated = text[:MAX_QUOTED_INPUT_LENGTH]
    printable = "".join(c if c.isprintable() else _escape_character(c) for c in truncated)
    return printable if truncated == text else printable + "..."


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _quote_json(value: object) -> str:
    """Return a field's value as JSON, so that the string "4" and the number 4 look different."""
    text = ""
    if isinstance(value, str):
        value = value[: MAX_QUOTED_INPUT_LENGTH + 1]
    try:
        for part in _QUOTING_ENCODER.iterencode(value):  # lazily: the value may have megabytes
            text += part[: MAX_QUOTED_INPUT_LENGTH + 1]
            if len(text) > MAX_QUOTED_INPUT_LENGTH:
                break
    except RecursionError:
        return "a value that is nested too deeply"
    return quote_input(text)


def invalid_json(reason: str) -> ApiError:
    """Return the error for a body that is not JSON."""
    return ApiError(
        f"We could not parse the JSON body of your request: {reason}.", code="invalid_json"
    )


def from_json_error(error: BaseException) -> ApiError:
    """Return the API error of an exception that Python's JSON parser raised."""
    if isinstance(error, json.JSONDecodeError):
        return invalid_json(f"{error.msg} at character {error.pos}")
    if isinstance(error, RecursionError):
        return invalid_json("it is nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return invalid_json(f"got byte 0x{byte:02x} at position {error.start}, expected UTF-8")
    if isinstance(error, ValueError):
        return invalid_json(f"a number has more than {sys.get_int_max_str_digits()} digits")
    return invalid_json("it could not be read")


def add_error_handlers(app: FastAPI) -> None:
    """Make the app answer every exception with an OpenAI-shaped error."""

    async def handle_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(request.url.path, error)

    async def handle_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(request.url.path, from_validation_errors(error.errors()))

    async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(request.url.path, _from_http_exception(request, error))

    async def handle_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ClientDisconnected, handle_disconnect)
    app.add_exception_handler(ClientDisconnect, handle_disconnect)
    app.add_exception_handler(ApiError, handle_api_error)
    add_router_error_handler(app)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)


def add_router_error_handler(app: FastAPI) -> None:
    """Make the app answer the router's errors, and leave all others as they are."""

    async def handle_router_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RouterError)
        set_refusal_reason(request.scope, error)
        return error_response(request.url.path, from_router_error(error))

    app.add_exception_handler(RouterError, handle_router_error)


def error_response(path: str, error: ApiError) -> JSONResponse:
    """Return the response to a request for a path, in the form of the API that it belongs to."""
    response = error.response()
    if ANTHROPIC_PATH not in path:  # a tenant's path has its name before it
        return response
    headers = {name: v for name, v in response.headers.items() if name != "content-length"}
    return JSONResponse(anthropic_error(error), status_code=error.status, headers=headers)


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return the body of an error in Anthropic's form, with OpenAI's fields beside its own."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_ERROR_TYPES.get(error.status, default)
    return {"type": "error", "error": {**error.body["error"], "type": kind}}


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 400 and error.__cause__ is not None:
        return from_json_error(error.__cause__)
    url = quote_input(f"{request.method} {request.url.path}")
    messages = {
        404: f"Unknown request URL: {url}.",
        405: f"Method not allowed: {url}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = _HTTP_ERROR_CODES.get(error.status_code)
    return ApiError(message, status=error.status_code, code=code)
