"""A request that the gateway refuses itself, in the form of the API that was called."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.types import Send

MESSAGES_PATH = "/v1/messages"
RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
BUDGET_EXCEEDED = "budget_exceeded"
_TYPES: Mapping[int, str] = {429: "rate_limit_error", 503: "server_error"}
_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """A request is refused; the message is for the client.

    Args:
        message: what was got and expected.
        status: the HTTP status.
        code: OpenAI's code.
        param: the parameter that is at fault.
        headers: further headers of the response.
        limit: the limit per minute that refuses it; empty for none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        limit: str = "",
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self, path: str) -> bytes:
        """Return the JSON body for a path of the API."""
        if path.endswith(MESSAGES_PATH):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return json.dumps(
                {"type": "error", "error": {"type": kind, "message": str(self)}}
            ).encode()
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    async def send(self, send: Send, path: str) -> None:
        """Send the response."""
        await send_json(send, self.body(path), status=self.status, headers=self.headers)


def invalid_api_key() -> Refusal:
    """Return the refusal of a missing, wrong, expired or other tenant's key."""
    return Refusal(
        "Incorrect API key provided. Send one of your tenant's keys in the header "
        "'Authorization: Bearer KEY'.",
        status=401,
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def model_not_found(name: str) -> Refusal:
    """Return the refusal of a model that does not exist, or that the caller may not use."""
    return Refusal(
        f"The model {json.dumps(name[:80])} does not exist or you do not have access to it.",
        status=404,
        code="model_not_found",
        param="model",
    )


def unknown_path(path: str) -> Refusal:
    """Return the refusal of a path that does not exist."""
    return Refusal(f"path: got {path[:80]}, which does not exist", status=404, code="not_found")


async def send_json(
    send: Send, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole JSON response."""
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    fields |= headers or {}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
