"""A sandbox's HTTP routes: method and path to the sandbox's verbs, errors to statuses."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from asyncio import Future
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from faasmoe_expert.device import why_lost
from faasmoe_expert.errors import (
    SHOWN_CHARS,
    BadAttachment,
    DeviceLost,
    Draining,
    OutOfMemory,
    SandboxError,
    shown,
)
from faasmoe_expert.server.answer import FRAME, Answer
from faasmoe_expert.server.attaching import Attaching
from faasmoe_expert.server.gathering import Gathering, Senders
from faasmoe_expert.server.request import HttpRequest
from faasmoe_expert.server.sandbox import Sandbox
from faasmoe_expert.table import FunctionSpec, TableError
from faasmoe_expert.wire.checksum import Buffer

log = logging.getLogger(__name__)

FUNCTIONS = "/v1/functions"
WORK = ("POST", "PUT")  # what a sandbox that ends does not begin
PATH_MAX_CHARS = 4096
Coming = Coroutine[Any, Any, Answer]
ATTACHMENT = frozenset({"id", "store", "model_digest", "layers", "experts"})


class Routes:
    """Answers whole requests; never raises.

    Args:
        sandbox: what the routes lead to.
        attaching: attaches beside the event loop; None for at once, before the answer is returned.
        on_lost: is called with why, once, when the sandbox's device cannot be used any more.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        attaching: Attaching | None = None,
        *,
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._sandbox = sandbox
        self._attaching = attaching
        self._senders = Senders()
        self._gathering = Gathering(sandbox.compute)
        self._expected = f"Bearer {sandbox.config.token}".encode()
        self._drains_from_s = math.inf  # on the monotonic clock
        self._on_lost = on_lost
        self._is_lost = False

    def drain(self) -> None:
        """Begin no more work, and say so; requests that are being read are still answered."""
        self._drains_from_s = time.monotonic()

    @property
    def is_draining(self) -> bool:
        """Tell whether `drain` was called."""
        return self._drains_from_s < math.inf

    def handle(self, request: HttpRequest) -> Answer | Future[Answer]:
        """Return the answer of a request, or one to come: of what takes long, or is gathered.

        A fault of our own is a 500 and a log line.
        """
        try:
            answer = self._route(request)
        except Exception as error:
            answer = self._refusal(request, error)
        if isinstance(answer, Answer):
            return self._finished(request, answer)
        return asyncio.ensure_future(self._later(request, answer))

    async def _later(self, request: HttpRequest, coming: Coming) -> Answer:
        try:
            answer = await coming
        except Exception as error:
            answer = self._refusal(request, error)
        return self._finished(request, answer)

    def _finished(self, request: HttpRequest, answer: Answer) -> Answer:
        is_last = self.is_draining and request.method in WORK
        return replace(answer, close=True) if is_last else answer

    def _refusal(self, request: HttpRequest, error: Exception) -> Answer:
        """Return what is answered in place of an error."""
        if _is_out_of_memory(error):
            error = OutOfMemory(f"memory: cannot be had ({shown(str(error))})")
        elif not isinstance(error, SandboxError):
            error = self._lost_by(error) or error
        if isinstance(error, SandboxError):
            self._sandbox.metrics.refused.labels(error.code).inc()
            return Answer.of_json(error.status, error.to_json())
        target = request.target.decode("latin-1")
        log.error("%s %s failed", request.method, target, exc_info=error)
        self._sandbox.metrics.refused.labels("internal").inc()
        return Answer.of_error(500, "internal", "the sandbox failed; see its log")

    def _lost_by(self, error: Exception) -> DeviceLost | None:
        """Return what is told if an error has ended the device; the sandbox is to end, too."""
        why = why_lost(self._sandbox.device)
        if why is None:
            return None
        if not self._is_lost:
            self._is_lost = True
            log.critical("the device %s is lost: %s", self._sandbox.device, why, exc_info=error)
            self._on_lost(why)
        return DeviceLost(f"device: {self._sandbox.device} is lost ({shown(why)})", field="device")

    def _route(self, request: HttpRequest) -> Answer | Coming:
        path = request.target.decode("latin-1").partition("?")[0]
        if path.startswith("/v1/"):
            return self._functions(request, path)
        if request.method not in ("GET", "HEAD"):  # load balancers probe with HEAD
            message = f"method: got {request.method}, expected GET or HEAD"
            return Answer.of_error(405, "bad_method", message, field="method")
        if path == "/healthz":
            return Answer.of_json(200, {"status": "ok"})
        if path == "/readyz":
            if self.is_draining:
                return Answer.of_json(503, {"status": "draining"})
            return Answer.of_json(200, {"status": "ready"})
        if path == "/metrics":
            text = self._sandbox.metrics.text()
            return Answer(200, "text/plain; version=0.0.4; charset=utf-8", [text])
        return _not_found(path)

    def _functions(self, request: HttpRequest, path: str) -> Answer | Coming:
        token = self._sandbox.config.token
        if token and not hmac.compare_digest(request.authorization, self._expected):
            message = "authorization: expected the bearer token"
            return Answer.of_error(401, "unauthorized", message, field="authorization")
        if path == FUNCTIONS and request.method == "GET":
            return Answer.of_json(200, self._sandbox.list_functions())
        base, _, function_id = path.rpartition("/")
        if base != FUNCTIONS or not function_id:
            return _not_found(path)
        return self._function(request, function_id)

    def _function(self, request: HttpRequest, function_id: str) -> Answer | Coming:
        if request.method in WORK and (request.begun_s or 0.0) > self._drains_from_s:
            raise Draining("sandbox: it ends, expected the work at another one")
        if request.method == "POST":
            return self._compute(function_id, request)
        if request.method == "PUT":
            return self._attach(function_id, request.body)
        if request.method == "DELETE":
            self._sandbox.detach(function_id)
            return Answer(204, "application/json", [])
        message = f"method: got {request.method}, expected POST, PUT or DELETE"
        return Answer.of_error(405, "bad_method", message, field="method")

    def _compute(self, function_id: str, request: HttpRequest) -> Answer | Coming:
        work = self._sandbox.read(function_id, request.frame)
        self._sandbox.metrics.shared_frames.inc(request.shared is not None)
        if self._senders.are_several(request.sender, time.monotonic()):
            return _computed(self._gathering.add(work))
        return Answer(200, FRAME, self._sandbox.compute([work])[0])

    def _attach(self, function_id: str, body: Buffer) -> Answer | Coming:
        value = _object(bytes(body))
        _refuse_unknown(value, function_id)
        try:
            spec = FunctionSpec.from_json({**value, "id": function_id})
        except TableError as error:
            raise BadAttachment(str(error), field=str(error).partition(":")[0]) from error
        store, digest = (_text(value, name) for name in ("store", "model_digest"))
        if len(store) > PATH_MAX_CHARS:
            message = f"store: got {len(store)} characters, expected at most {PATH_MAX_CHARS}"
            raise BadAttachment(message, field="store")
        if self._attaching is None:
            return _attached(self._sandbox.attach(spec, store=Path(store), model_digest=digest))
        attach = self._attaching.attach(spec, store=Path(store), model_digest=digest)
        return _attached_later(attach)


async def _computed(coming: Awaitable[list[Buffer]]) -> Answer:
    return Answer(200, FRAME, await coming)


async def _attached_later(coming: Awaitable[tuple[dict[str, Any], bool]]) -> Answer:
    return _attached(await coming)


def _attached(found: tuple[dict[str, Any], bool]) -> Answer:
    function, is_new = found
    return Answer.of_json(201 if is_new else 200, function)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell want of memory from other faults: some say it by a RuntimeError."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    is_told = "allocate memory" in said or "start new thread" in said  # torch's; Python's own
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_told


def _not_found(path: str) -> Answer:
    message = f"path: got {shown(path)}, expected {FUNCTIONS}[/ID], /healthz, /readyz or /metrics"
    return Answer.of_error(404, "not_found", message, field="path")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))  # given bytes, it guesses among encodings
    except (ValueError, RecursionError) as error:
        raise BadAttachment(f"body: not JSON ({error})", field="body") from error
    if not isinstance(value, dict):
        raise BadAttachment(f"body: got {type(value).__name__}, expected an object", field="body")
    return value


def _refuse_unknown(value: dict[str, Any], function_id: str) -> None:
    for name in sorted(value.keys() - ATTACHMENT):
        field = name[:SHOWN_CHARS]
        message = f"{field}: got an unknown field, expected {', '.join(sorted(ATTACHMENT))}"
        raise BadAttachment(message, field=field)
    if value.get("id", function_id) != function_id:
        message = f"id: got {shown(value['id'])}, expected {function_id} as in the path"
        raise BadAttachment(message, field="id")


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found or not found.isprintable():
        raise BadAttachment(f"{name}: got {shown(found)}, expected a printable text", field=name)
    return found
