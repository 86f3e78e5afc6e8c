"""ASGI middleware between the router's authentication and vLLM's OpenAI app.

It passes on the routes that generate text, and no other of vLLM's, some of which administer the
engine. It lets a tenant's alias stand for the model's name, adds the tenant's system prompt, and
lets a request wait for the activation of functions before vLLM sees it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect as StarletteDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.admission import (
    COLD_START_HEADER,
    RequestActivator,
    TenantAdmission,
)
from faasmoe_router.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    ClientDisconnected,
    error_response,
    from_json_error,
    from_router_error,
    model_not_found,
    not_an_object,
)
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.request_span import scope_span
from faasmoe_router.api.resumption import is_resumed, tell_prepared
from faasmoe_router.api.streaming import run_until_disconnect
from faasmoe_router.errors import RouterError
from faasmoe_router.tenants.service import Caller
from faasmoe_router.vllm_backend.generation_span import begin_generation
from faasmoe_router.vllm_backend.request_account import REQUEST, RequestContext

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
OTHER_PATHS = ("/v1/messages/count_tokens", "/tokenize", "/detokenize")
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
COMPLETED = b"event: response.completed\ndata: "
BYTES_PER_TOKEN = 4
"""Of a body, to estimate which functions its prompt needs before it is tokenized."""


class TenantMiddleware:
    """Hands the requests of tenants to vLLM's app.

    Args:
        app: vLLM's app.
        model_name: the model's own name.
        activator: queues requests whose functions are not active.
        admission: the tenants' part of that queue.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model_name: str,
        activator: RequestActivator,
        admission: TenantAdmission,
    ) -> None:
        self._app = app
        self._model_name = model_name
        self._activator = activator
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        path = scope["path"]
        try:
            if scope["type"] != "http" or path not in GENERATION_PATHS + OTHER_PATHS:
                await Request(scope, receive).body()  # unread, it could reset the connection
                raise _unknown_url(scope)
            await self._pass_on(scope, receive, send)
        except RouterError as error:
            await error_response(path, from_router_error(error))(scope, receive, send)
        except ApiError as error:
            await error_response(path, error)(scope, receive, send)
        except (ClientDisconnected, StarletteDisconnect):
            await send({"type": "http.response.start", "status": CLIENT_CLOSED_REQUEST})
            await send({"type": "http.response.body"})

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_resumed(scope):
            raise ApiError(
                "This stream cannot go on here: the engine vllm keeps no journal of streams.",
                code="invalid_journal",
            )
        request = Request(scope, receive)
        caller = get_caller(request)
        body, value = await request.body(), dict[str, Any]()
        tell_prepared(request)  # vLLM does the rest, and says nothing of it
        if scope["method"] == "POST":
            value = parse_body(body, caller, self._model_name)
            value |= tools_with_parameters(value)
            body = json.dumps(value | system_prompt(value, scope["path"], caller)).encode()
        context = RequestContext(caller, token_limit(value, caller) is not None)
        inner = {**scope, "headers": _with_length(scope, len(body))}
        received, answer = _BodyThenReceive(body, receive), _Answer(context, send)
        if scope["path"] not in GENERATION_PATHS:
            await self._app(inner, received, answer)
            return
        with begin_generation(
            scope_span(scope), scope["path"], value, model=self._model_name, tenant=caller.tenant
        ) as context.span:
            await self._wait_for_functions(request, caller, context, len(body))
            token = REQUEST.set(context)
            try:
                await self._app(inner, received, answer)
            finally:
                REQUEST.reset(token)

    async def _wait_for_functions(
        self, request: Request, caller: Caller, context: RequestContext, n_bytes: int
    ) -> None:
        n_tokens = max(1, n_bytes // BYTES_PER_TOKEN)
        if self._activator.is_activated_for(n_tokens):
            return
        slot = self._admission.queue_slot(caller, size_bytes=n_bytes)
        with slot, context.span.child("hold") as hold:
            waiting = self._activator.wait_for_activation(n_tokens, size_bytes=n_bytes, span=hold)
            queued_s = await run_until_disconnect(request, waiting)
        if queued_s:
            context.headers[COLD_START_HEADER] = f"{queued_s:.3f}"


def parse_body(body: bytes, caller: Caller, model_name: str) -> dict[str, Any]:
    """Return a body with the model's own name for whatever name the caller may use.

    Args:
        body: JSON.
        caller: who sent it.
        model_name: the model's own name.

    Raises:
        ApiError: it is not a JSON object, or names another model.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise from_json_error(error) from error
    if not isinstance(value, dict):
        raise not_an_object()
    requested = value.get("model", model_name)
    if isinstance(requested, str) and requested not in caller.model_names(model_name):
        raise model_not_found(requested)
    return value | {"model": model_name}


def token_limit(value: Mapping[str, Any], caller: Caller) -> int | None:
    """Return how many tokens a request wants at most; None if it leaves that to the server.

    Raises:
        ApiError: it wants more than its caller may.
    """
    given = [(name, value[name]) for name in TOKEN_LIMITS if isinstance(value.get(name), int)]
    for name, requested in given:
        if caller.max_output_tokens is not None and requested > caller.max_output_tokens:
            raise ApiError(
                f"{name} is too large: {requested}. Your tenant may generate at most "
                f"{caller.max_output_tokens} completion tokens, whereas you provided {requested}.",
                param=name,
                code="invalid_value",
            )
    return given[0][1] if given else None


def tools_with_parameters(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `tools` where functions without parameters take an empty object.

    vLLM would let their arguments be any JSON.
    """
    tools = value.get("tools")
    if not isinstance(tools, list):
        return {}
    return {"tools": [_with_parameters(tool) for tool in tools]}


def _with_parameters(tool: Any) -> Any:
    """Return a tool of a chat, or of a response, which has the function's fields itself."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    function = tool.get("function", tool)
    if not isinstance(function, dict) or function.get("parameters") is not None:
        return tool
    completed = {**function, "parameters": NO_PARAMETERS}
    return {**tool, "function": completed} if "function" in tool else completed


def system_prompt(value: Mapping[str, Any], path: str, caller: Caller) -> dict[str, Any]:
    """Return the fields that a caller's system prompt changes; none if the request has its own.

    Args:
        value: the body.
        path: the route, which says where a system prompt goes.
        caller: who sent it.
    """
    if caller.system_prompt is None:
        return {}
    messages = value.get("messages")
    if path == "/v1/chat/completions" and isinstance(messages, list):
        if not all(isinstance(m, dict) and "role" in m for m in messages):
            return {}  # vLLM refuses it
        return {"messages": caller.with_system_prompt(messages)}
    field = {"/v1/messages": "system", "/v1/responses": "instructions"}.get(path)
    return {} if field is None or value.get(field) else {field: caller.system_prompt}


class _BodyThenReceive:
    """An ASGI receive callable that begins with a body that was read before."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


def renamed_event(event: bytes) -> bytes:
    """Return the last event of a streamed response under OpenAI's name for one that was cut.

    vLLM calls it completed whatever its status.
    """
    if not event.startswith(COMPLETED):
        return event
    value = json.loads(event.removeprefix(COMPLETED))
    if value["response"]["status"] != "incomplete":
        return event
    renamed = json.dumps(value | {"type": "response.incomplete"}, separators=(",", ":"))
    return f"event: response.incomplete\ndata: {renamed}\n\n".encode()


class _Answer:
    """An ASGI send callable: the headers of a request's context, and names of events."""

    def __init__(self, context: RequestContext, send: Send) -> None:
        self._context = context
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in self._context.headers.items():
                headers[name] = value
        elif message.get("body"):
            message = {**message, "body": renamed_event(message["body"])}
        await self._send(message)


def _with_length(scope: Scope, n_bytes: int) -> list[tuple[bytes, bytes]]:
    kept = [(n, v) for n, v in scope["headers"] if n not in (b"content-length",)]
    return [*kept, (b"content-length", str(n_bytes).encode())]


def _unknown_url(scope: Scope) -> ApiError:
    url = f"{scope.get('method', '')} {scope['path']}"
    return ApiError(f"Unknown request URL: {url!r}.", status=404, code="not_found")
