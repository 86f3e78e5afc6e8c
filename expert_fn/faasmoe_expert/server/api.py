"""HTTP routes of a sandbox: maps requests to SandboxRuntime, and errors to statuses.

    GET    /v1/functions       the sandbox and its functions, or with ?store=PATH those of a store
    PUT    /v1/functions       attach several functions
    DELETE /v1/functions       detach the functions of a store
    PUT    /v1/functions/ID    attach a function
    POST   /v1/functions/ID    compute a frame
    DELETE /v1/functions/ID    detach a function
    PUT    /v1/mailbox         serve the client's mailbox while it is connected
    GET    /healthz, /readyz, and /metrics unless it has a port of its own

Frames of several routers are batched; attaching runs in the background. See docs/wire.md.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from asyncio import Future
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import torch

from faasmoe_contracts.shared_region import MAILBOX_PATH
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.wire import Buffer
from faasmoe_expert import malloc
from faasmoe_expert.device import device_lost_reason
from faasmoe_expert.errors import (
    MailboxRefused,
    OutOfMemory,
    SandboxDeviceLost,
    SandboxDraining,
    SandboxError,
)
from faasmoe_expert.server.attachments import (
    Attachment,
    parse_attachment,
    parse_attachments,
    parse_detachment,
    parse_listed_store,
    parse_object,
)
from faasmoe_expert.server.batcher import DynamicBatcher, SenderTracker
from faasmoe_expert.server.http import FRAME_CONTENT_TYPE, HttpRequest, HttpResponse, RequestHandler
from faasmoe_expert.server.loader import BackgroundLoader
from faasmoe_expert.server.runtime import SandboxRuntime

logger = logging.getLogger(__name__)

FUNCTIONS_PATH = "/v1/functions"
METRICS_PATH = "/metrics"
WORK_METHODS = ("POST", "PUT")  # rejected while draining
PendingResponse = Coroutine[Any, Any, HttpResponse]
TRIM_DELAY_S = 1.0


class SandboxRoutes:
    """Answers complete requests; never raises.

    Args:
        runtime: the sandbox's functions.
        loader: attaches functions in the background; None attaches before `handle` returns.
        on_device_lost: called once with the reason when the device becomes unusable.
    """

    def __init__(
        self,
        runtime: SandboxRuntime,
        loader: BackgroundLoader | None = None,
        *,
        on_device_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._runtime = runtime
        self._loader = loader
        self._sender_tracker = SenderTracker()
        self._batcher = DynamicBatcher(runtime.compute_batch)
        self._expected_authorization = f"Bearer {runtime.config.token}".encode()
        self._draining_since_s = math.inf  # on the monotonic clock
        self._on_device_lost = on_device_lost
        self._is_device_lost = False

    def is_authorized(self, authorization: bytes) -> bool:
        """Return whether an `Authorization` header has the bearer token, if there is one."""
        is_open = not self._runtime.config.token
        return is_open or hmac.compare_digest(authorization, self._expected_authorization)

    def start_draining(self) -> None:
        """Reject new work from now on; requests that have started arriving are still answered."""
        self._draining_since_s = time.monotonic()
        if self._runtime.mailboxes is not None:
            self._runtime.mailboxes.drain()

    @property
    def is_draining(self) -> bool:
        """Whether `start_draining` was called."""
        return self._draining_since_s < math.inf

    def handle(self, request: HttpRequest) -> HttpResponse | Future[HttpResponse]:
        """Return the response, or a future of it for attachments and batched frames.

        Unexpected exceptions are logged and answered with status 500.
        """
        try:
            response = self._route(request)
        except Exception as error:
            response = self._error_response(request, error)
        if isinstance(response, HttpResponse):
            return self._close_if_draining(request, response)
        return asyncio.ensure_future(self._await_response(request, response))

    async def _await_response(self, request: HttpRequest, pending: PendingResponse) -> HttpResponse:
        try:
            response = await pending
        except Exception as error:
            response = self._error_response(request, error)
        return self._close_if_draining(request, response)

    def _close_if_draining(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        closes = self.is_draining and request.method in WORK_METHODS
        return replace(response, close=True) if closes else response

    def _error_response(self, request: HttpRequest, error: Exception) -> HttpResponse:
        """Return the response for an exception, and count it in the metrics."""
        refusal = self._refusal(request, error)
        return HttpResponse.json_response(refusal.status, refusal.to_json())

    def _refusal(self, request: HttpRequest, error: Exception) -> SandboxError:
        """Return what the client is told of an exception, and count it in the metrics."""
        if _is_out_of_memory(error):
            error = OutOfMemory(f"memory: allocation failed ({short_repr(str(error))})")
        elif not isinstance(error, SandboxError):
            error = self._check_device_lost(error) or error
        if not isinstance(error, SandboxError):
            target = request.target.decode("latin-1")
            logger.error("%s %s failed", request.method, target, exc_info=error)
            error = SandboxError("internal error; see the sandbox's log")
        self._runtime.metrics.refused.labels(error.code).inc()
        return error

    def _check_device_lost(self, error: Exception) -> SandboxDeviceLost | None:
        """Return SandboxDeviceLost if the device is unusable after an error; reports it once."""
        reason = device_lost_reason(self._runtime.device)
        if reason is None:
            return None
        if not self._is_device_lost:
            self._is_device_lost = True
            logger.critical("device %s lost: %s", self._runtime.device, reason, exc_info=error)
            self._on_device_lost(reason)
        return SandboxDeviceLost(
            f"device: {self._runtime.device} is lost ({short_repr(reason)})", field="device"
        )

    def _route(self, request: HttpRequest) -> HttpResponse | PendingResponse:
        path = request.target.decode("latin-1").partition("?")[0]
        if path.startswith("/v1/"):
            return self._route_functions(request, path)
        if request.method not in ("GET", "HEAD"):  # load balancers probe with HEAD
            message = f"method: got {request.method}, expected GET or HEAD"
            return HttpResponse.error_response(405, "bad_method", message, field="method")
        if path == "/healthz":
            return HttpResponse.json_response(200, {"status": "ok"})
        if path == "/readyz":
            if self.is_draining:
                return HttpResponse.json_response(503, {"status": "draining"})
            return HttpResponse.json_response(200, {"status": "ready"})
        if path == METRICS_PATH and self._runtime.config.metrics_port is None:
            return self._metrics()
        return _not_found(path)

    def handle_metrics(self, request: HttpRequest) -> HttpResponse:
        """Return the response on the port of the metrics, which has nothing else."""
        path = request.target.decode("latin-1").partition("?")[0]
        return self._metrics() if path == METRICS_PATH else _not_found(path)

    def _metrics(self) -> HttpResponse:
        text = self._runtime.metrics.render()
        return HttpResponse(200, "text/plain; version=0.0.4; charset=utf-8", [text])

    def _route_functions(self, request: HttpRequest, path: str) -> HttpResponse | PendingResponse:
        if not self.is_authorized(request.authorization):
            message = "authorization: expected the bearer token"
            return HttpResponse.error_response(401, "unauthorized", message, field="authorization")
        if path == MAILBOX_PATH:
            return self._open_mailbox(request)
        if path == FUNCTIONS_PATH and request.method == "GET":
            store = parse_listed_store(request.target.decode("latin-1").partition("?")[2])
            return HttpResponse.json_response(200, self._runtime.list_functions(store))
        if path == FUNCTIONS_PATH and request.method == "DELETE":
            detacher = self._runtime if self._loader is None else self._loader
            detached = detacher.detach_all(parse_detachment(request.body))
            return HttpResponse.json_response(200, {"detached": detached})
        if path == FUNCTIONS_PATH and request.method == "PUT":
            self._check_draining(request)
            return self._attach_all(request, parse_attachments(request.body))
        base, _, function_id = path.rpartition("/")
        if base != FUNCTIONS_PATH or not function_id:
            return _not_found(path)
        return self._route_function(request, function_id)

    def _open_mailbox(self, request: HttpRequest) -> HttpResponse:
        """Serve the mailbox that the client offers, for as long as it is connected."""
        if request.method != "PUT":
            message = f"method: got {request.method}, expected PUT"
            return HttpResponse.error_response(405, "bad_method", message, field="method")
        if self.is_draining:
            raise SandboxDraining("sandbox: draining, retry on another sandbox")
        mailboxes, connection = self._runtime.mailboxes, request.connection
        if mailboxes is None:
            raise MailboxRefused("mailbox: this sandbox has none, expected HTTP", field="mailbox")
        if connection is None or connection.peer_pid is None:
            raise MailboxRefused("mailbox: expected a Unix socket", field="mailbox")
        value = parse_object(request.body)
        descriptor, size_bytes = (_require_integer(value, n) for n in ("descriptor", "size_bytes"))
        mailbox = mailboxes.open(connection.peer_pid, descriptor, size_bytes)
        connection.hold(mailbox)
        return HttpResponse.json_response(201, {"size_bytes": size_bytes})

    def _route_function(
        self, request: HttpRequest, function_id: str
    ) -> HttpResponse | PendingResponse:
        if request.method in WORK_METHODS:
            self._check_draining(request)
        if request.method == "POST":
            return self._compute(function_id, request)
        if request.method == "PUT":
            return self._attach(parse_attachment(request.body, function_id))
        if request.method == "DELETE":
            self._runtime.detach(function_id)
            return HttpResponse(204, "application/json", [])
        message = f"method: got {request.method}, expected POST, PUT or DELETE"
        return HttpResponse.error_response(405, "bad_method", message, field="method")

    def _compute(self, function_id: str, request: HttpRequest) -> HttpResponse | PendingResponse:
        task = self._runtime.parse_frame(function_id, request.frame)
        if request.shared_frame is not None:
            self._runtime.metrics.count_shared_frame()
        if self._sender_tracker.record_is_concurrent(request.sender, time.monotonic()):
            return _frame_response(self._batcher.submit(task))
        return HttpResponse(200, FRAME_CONTENT_TYPE, self._runtime.compute_batch([task])[0])

    def _check_draining(self, request: HttpRequest) -> None:
        """Raise SandboxDraining for work that arrives after `start_draining`."""
        if (request.started_s or 0.0) > self._draining_since_s:
            raise SandboxDraining("sandbox: draining, retry on another sandbox")

    def _attach(self, attachment: Attachment) -> HttpResponse | PendingResponse:
        if self._loader is None:
            return _attach_response(self._runtime.attach(attachment.spec, **attachment.source))
        return _await_attach_response(self._loader.attach(attachment.spec, **attachment.source))

    async def _attach_all(
        self, request: HttpRequest, attachments: Sequence[Attachment]
    ) -> HttpResponse:
        """Attach functions one after the other; one that is refused keeps none from the others."""
        refusals_or_statuses = (
            [self._attached_at_once(attachment) for attachment in attachments]
            if self._loader is None
            else await self._loader.attach_all(attachments)
        )
        results = []
        for attachment, result in zip(attachments, refusals_or_statuses, strict=True):
            if isinstance(result, Exception):
                refusal = self._refusal(request, result)
                result = {"id": attachment.spec.id, **refusal.to_json()}
            results.append(result)
        return HttpResponse.json_response(200, {"functions": results})

    def _attached_at_once(self, attachment: Attachment) -> dict[str, Any] | Exception:
        try:
            return self._runtime.attach(attachment.spec, **attachment.source)[0]
        except Exception as error:
            return error


async def _frame_response(pending: Awaitable[list[Buffer]]) -> HttpResponse:
    return HttpResponse(200, FRAME_CONTENT_TYPE, await pending)


async def _await_attach_response(pending: Awaitable[tuple[dict[str, Any], bool]]) -> HttpResponse:
    return _attach_response(await pending)


def _attach_response(result: tuple[dict[str, Any], bool]) -> HttpResponse:
    function, is_new = result
    return HttpResponse.json_response(201 if is_new else 200, function)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception means out of memory; torch and Python also use RuntimeError."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    has_memory_message = (
        "allocate memory" in message  # torch's CPU allocator
        or "start new thread" in message  # threading
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or has_memory_message


def _not_found(path: str) -> HttpResponse:
    message = (
        f"path: got {short_repr(path)}, "
        f"expected {FUNCTIONS_PATH}[/ID], {MAILBOX_PATH}, /healthz, /readyz or /metrics"
    )
    return HttpResponse.error_response(404, "not_found", message, field="path")


def _require_integer(value: dict[str, Any], name: str) -> int:
    number = value.get(name)
    if type(number) is not int or not 0 <= number < 1 << 40:
        raise MailboxRefused(f"{name}: got {short_repr(number)}, expected an integer", field=name)
    return number


class HeapTrimmer:
    """Wraps a request handler and trims the heap shortly after requests.

    Trims once for all requests within the delay: 0.2 ms per second under load. An idle sandbox has
    no timer.

    Args:
        handle: the wrapped handler.
        delay_s: time from a request until the heap is trimmed.
        trim: trims the heap.
    """

    def __init__(
        self,
        handle: RequestHandler,
        *,
        delay_s: float = TRIM_DELAY_S,
        trim: Callable[[], None] = malloc.trim_heap,
    ) -> None:
        self._handle = handle
        self._delay_s = delay_s
        self._trim = trim
        self._is_scheduled = False

    def handle(self, request: HttpRequest) -> HttpResponse | Future[HttpResponse]:
        """Return the response of the wrapped handler."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(self._delay_s, self._run_trim)
        return self._handle(request)

    def _run_trim(self) -> None:
        self._is_scheduled = False
        self._trim()
