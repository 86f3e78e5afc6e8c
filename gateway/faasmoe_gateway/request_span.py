"""The span of one request in the gateway: from its head to the end of its response."""

from __future__ import annotations

from starlette.types import Message, Scope, Send

from faasmoe_tracing import NO_SPAN, TRACEPARENT, Span, SpanKind, Tracer

ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/v1/tokenize", "/v1/detokenize"),
)
SERVER_ERROR = 500


def begin_request_span(tracer: Tracer, scope: Scope) -> Span:
    """Begin the span of a request that is work; others are not traced.

    A client's `traceparent` makes it a child of the client's span. Its name is one of few, whatever
    path the client has asked for.
    """
    if not tracer.is_enabled or scope["method"] != "POST":
        return NO_SPAN
    path: str = scope["path"]
    route = next((route for route in ROUTES if path.endswith(route)), "")
    attributes = {"http.request.method": "POST", "url.scheme": str(scope.get("scheme", "http"))}
    if route:
        attributes["http.route"] = route
    name = TRACEPARENT.encode()
    parent: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return tracer.span(
        f"POST {route}".rstrip(),
        traceparent=parent.decode("latin-1"),
        kind=SpanKind.SERVER,
        attributes=attributes,
    )


def recording_status(send: Send, span: Span) -> Send:
    """Return an ASGI send callable that records the response's status in a span."""
    if not span.is_recorded:
        return send

    async def send_and_record(message: Message) -> None:
        if message["type"] == "http.response.start":
            status = int(message["status"])
            span.set({"http.response.status_code": status})
            if status >= SERVER_ERROR:
                span.fail(str(status))
        await send(message)

    return send_and_record
