"""Spans of one request in the router: its HTTP span, and within it that of its generation.

The latter follows OpenTelemetry's conventions for generative AI, with their required attributes and
without any text; `engine/sequence_spans.py` adds queueing, prefill and decoding below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from faasmoe_gateway.request_span import begin_request_span, recording_status
from faasmoe_router.api.protocol import ChatCompletionRequest, CompletionRequestBase
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_tracing import NO_SPAN, Attribute, Span, Tracer

PROVIDER = "faasmoe"
CHAT, TEXT_COMPLETION = "chat", "text_completion"


class TracingMiddleware:
    """ASGI middleware that traces requests from their head to the end of their response.

    Args:
        app: the wrapped ASGI app.
        tracer: traces them.
    """

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with begin_request_span(self._tracer, scope) as span:
            state = {**scope.get("state", {}), "span": span}
            await self._app({**scope, "state": state}, receive, recording_status(send, span))


def get_span(request: Request) -> Span:
    """Return the HTTP span of a request."""
    return scope_span(request.scope)


def scope_span(scope: Scope) -> Span:
    """Return the HTTP span of an ASGI connection."""
    span = scope.get("state", {}).get("span", NO_SPAN)
    assert isinstance(span, Span)
    return span


def begin_generation_span(
    request: Request,
    body: CompletionRequestBase,
    requests: Sequence[GenerationRequest],
    *,
    model: str,
    tenant: str,
    n_prompt_tokens: int,
) -> Span:
    """Begin the span of a generation.

    Args:
        request: the HTTP request.
        body: its parameters.
        requests: its sequences.
        model: name of the served model.
        tenant: whose request it is; empty without tenants.
        n_prompt_tokens: tokens of its prompts.
    """
    http_span = get_span(request)
    if not http_span.is_recorded:
        return http_span
    is_chat = isinstance(body, ChatCompletionRequest)
    operation = CHAT if is_chat else TEXT_COMPLETION
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": body.model or model,
        "gen_ai.response.model": model,
        "gen_ai.output.type": "text",
        "gen_ai.request.stream": bool(body.stream),
        "gen_ai.request.choice.count": body.n or 1,
        "gen_ai.request.max_tokens": max(r.max_tokens for r in requests),
        "gen_ai.usage.input_tokens": n_prompt_tokens,
        **_sampling_attributes(requests[0]),
    }
    if tenant:
        attributes["faasmoe.tenant"] = tenant
    return http_span.child(f"{operation} {model}", attributes=attributes)


@contextmanager
def ended_on_error(span: Span) -> Iterator[None]:
    """End a span with an error if its generation does not start; else the generation ends it."""
    try:
        yield
    except BaseException as error:
        span.fail(type(error).__name__)
        span.end()
        raise


def _sampling_attributes(request: GenerationRequest) -> dict[str, Attribute]:
    draw, penalties = request.sampling_params.draw, request.sampling_params.penalties
    return {
        "gen_ai.request.temperature": draw.temperature,
        "gen_ai.request.top_p": draw.top_p,
        "gen_ai.request.frequency_penalty": penalties.frequency,
        "gen_ai.request.presence_penalty": penalties.presence,
    }
