"""What the control API refuses, and the error objects that say so."""

from __future__ import annotations

import json

from aiohttp import web


class Refusal(Exception):
    """A request that is refused and has changed nothing.

    Attributes:
        status: the HTTP status.
        code: machine-stable.
        field: the field at fault, None if it is none of the body's.
    """

    def __init__(self, message: str, *, status: int, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def response(self) -> web.Response:
        """Return the HTTP answer."""
        error = {"code": self.code, "message": str(self), "field": self.field}
        return web.Response(
            status=self.status,
            text=json.dumps({"error": error}),
            content_type="application/json",
        )


def invalid(field: str, got: object, expected: str) -> Refusal:
    """Return the refusal of a field's value."""
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    message = f"{field}: got {shown}, expected {expected}"
    return Refusal(message, status=422, code="invalid", field=field)
