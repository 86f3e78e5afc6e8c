"""The control API's applications: of one model, of all models of a machine, and of the operator's.

They serve the routes of `routes.py`: at `/v1` for one model and at `/models/NAMESPACE/NAME/v1` for
many, each authorised by the model's own bearer token; on one machine all models have the same.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aiohttp import web

from faasmoe_operator.control.api.requests import (
    RequestRejected,
    invalid_field,
    parse_model_name,
    parse_router_report,
)
from faasmoe_operator.control.api.routes import CONTROLLER, ROUTE_NAMES, ModelRoutes
from faasmoe_operator.control.api.status import render_models_metrics, update_gauges
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.machine_memory import MemoryPool
from faasmoe_operator.control.models_file import LOCAL_NAMESPACE, ROUTERS_PATH, WARM_PATH

MAX_BODY_BYTES = 1 << 20
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODEL_PATH = "/models/{namespace}/{name}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ControllerLookup = Callable[[str, str], tuple[Controller, str] | None]
"""Returns a model's controller and token by namespace and name; None if there is no such model."""


def make_model_app(controller: Controller, *, token: str) -> web.Application:
    """Return the API of one controller, with /metrics and /healthz.

    Args:
        controller: a started controller.
        token: bearer token that /v1 requires.
    """

    async def metrics(_: web.Request) -> web.Response:
        update_gauges(controller)
        body = controller.metrics.render()
        return web.Response(body=body, headers={"Content-Type": METRICS_CONTENT_TYPE})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def resolve(request: web.Request) -> Controller | None:
        if not request.path.startswith("/v1/"):
            return None
        _authorize(request, token)
        return controller

    extra_routes = [web.get("/metrics", metrics), web.get("/healthz", healthz)]
    return _make_app("", resolve, extra_routes)


def make_models_app(
    lookup: ControllerLookup, *, extra_routes: Iterable[web.RouteDef] = ()
) -> web.Application:
    """Return the API of many models, each authorised by its own token.

    Args:
        lookup: finds a model's controller and token, at each request.
        extra_routes: further routes, which require no token.
    """
    dummy_token = secrets.token_hex(32)

    def resolve(request: web.Request) -> Controller | None:
        if not request.path.startswith("/models/"):
            return None
        _, _, namespace, name, *_ = (*request.path.split("/"), "", "")
        found = lookup(namespace, name)
        # An unknown model takes the same steps and gives the same response as a wrong token.
        _authorize(request, dummy_token if found is None else found[1])
        return None if found is None else found[0]

    return _make_app(MODEL_PATH, resolve, extra_routes)


def make_machine_app(
    controllers: Mapping[str, Controller],
    *,
    token: str,
    memory: MemoryPool | None,
    n_processes: Callable[[], int],
) -> web.Application:
    """Return the API of all models of a machine, with /routers, /warm, /metrics and /healthz.

    Args:
        controllers: the running controllers by model, at each request.
        token: bearer token that the models, /routers and /warm require.
        memory: the memory that they share with routers; None for no limit.
        n_processes: returns the number of sandbox processes, each of which models may share.
    """

    async def metrics(_: web.Request) -> web.Response:
        running = [((LOCAL_NAMESPACE, n), controllers[n]) for n in sorted(controllers)]
        body = render_models_metrics(running, n_processes=n_processes())
        return web.Response(body=body, headers={"Content-Type": METRICS_CONTENT_TYPE})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def routers(request: web.Request) -> web.Response:
        _authorize(request, token)
        reported = parse_router_report(await request.read(), now=time.monotonic())
        names = [r.name for r in reported if r.is_wanted]
        may_run = names if memory is None else sorted(memory.update_routers(reported))
        return web.json_response({"may_run": may_run})

    async def warm(request: web.Request) -> web.Response:
        _authorize(request, token)
        controller = controllers.get(parse_model_name(await request.read()))
        if controller is None:
            raise invalid_field("model", "an unknown model", "a model of this machine")
        controller.warm_up()
        return web.Response(status=202)

    def lookup(namespace: str, name: str) -> tuple[Controller, str] | None:
        controller = controllers.get(name) if namespace == LOCAL_NAMESPACE else None
        return None if controller is None else (controller, token)

    extra_routes = [
        web.get("/metrics", metrics),
        web.get("/healthz", healthz),
        web.post(ROUTERS_PATH, routers),
        web.post(WARM_PATH, warm),
    ]
    return make_models_app(lookup, extra_routes=extra_routes)


def _make_app(
    prefix: str,
    resolve: Callable[[web.Request], Controller | None],
    extra_routes: Iterable[web.RouteDef],
) -> web.Application:
    @web.middleware
    async def handle_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestRejected as error:
            rejection = error
        except web.HTTPException as error:
            rejection = _to_rejection(error, request, prefix=prefix)
        if (controller := request.get(CONTROLLER)) is not None:
            controller.metrics.rejected_requests.labels(rejection.code).inc()
        return rejection.response()

    @web.middleware
    async def resolve_controller(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (controller := resolve(request)) is not None:
            request[CONTROLLER] = controller
        return await handler(request)

    routes = ModelRoutes()
    app = web.Application(
        client_max_size=MAX_BODY_BYTES, middlewares=[handle_errors, resolve_controller]
    )
    app.add_routes([*routes.route_defs(prefix), *extra_routes])
    app.on_shutdown.append(routes.close)
    return app


def _authorize(request: web.Request, token: str) -> None:
    """Raise RequestRejected unless the request carries this token."""
    received = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    if not hmac.compare_digest(received, f"Bearer {token}".encode()):
        message = "authorization: expected the bearer token"
        raise RequestRejected(message, status=401, code="unauthorized", field="authorization")


def _to_rejection(
    error: web.HTTPException, request: web.Request, *, prefix: str
) -> RequestRejected:
    if error.status == 413:
        message = f"body: expected at most {MAX_BODY_BYTES} bytes"
        return RequestRejected(message, status=413, code="too_large", field="body")
    if error.status == 404:
        known = ", ".join(f"{prefix}/v1/{name}" for name in ROUTE_NAMES)
        message = f"path: got {request.path}, expected {known}"
        return RequestRejected(message, status=404, code="not_found", field="path")
    if error.status == 405:
        message = f"method: got {request.method}, which {request.path} does not allow"
        return RequestRejected(message, status=405, code="bad_method", field="method")
    return RequestRejected(error.reason, status=error.status, code="refused")
