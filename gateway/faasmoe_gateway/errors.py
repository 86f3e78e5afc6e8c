"""OpenAI-shaped errors that a front sends itself."""

from __future__ import annotations

import json

from starlette.types import Send

RETRY_AFTER_S = 1


def error_body(message: str, *, status: int, code: str) -> bytes:
    """Return the JSON body of an error."""
    error_type = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": error_type, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


async def send_error(
    send: Send, message: str, *, status: int, code: str, retry_after_s: int = RETRY_AFTER_S
) -> None:
    """Send a whole error response over ASGI; 503 tells when to retry."""
    body = error_body(message, status=status, code=code)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 503:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
