"""Routes of one model: routing table stream, load and usage reports, activation, status.

The application has already authorised the request and resolved the controller. The table stream is
endless JSON lines. A slow reader does not delay others: it gets the changes since its last line
when it is ready for the next one. A reader that accepts no bytes is disconnected.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable

from aiohttp import web

from faasmoe_contracts.control_messages import (
    Ping,
    TableMessage,
    TableSnapshot,
    TableUpdate,
    TableVersion,
)
from faasmoe_operator.control.api.requests import (
    invalid_field,
    parse_activation_request,
    parse_load_report,
    parse_usage_report,
)
from faasmoe_operator.control.api.status import controller_status
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.routing_table import RoutingTablePublisher
from faasmoe_tracing import TRACEPARENT

logger = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S = 5.0
WRITE_TIMEOUT_S = 30.0
MAX_VERSION_DIGITS = 18

CONTROLLER = web.RequestKey("controller", Controller)
"""Request key of the controller of the addressed model."""

ROUTE_NAMES = ("table", "load", "usage", "wake", "status")


class ModelRoutes:
    """Handlers of a model's routes."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()

    def route_defs(self, prefix: str) -> list[web.RouteDef]:
        """Return the routes, with their paths below a prefix."""
        return [
            web.get(f"{prefix}/v1/table", self._table),
            web.post(f"{prefix}/v1/load", self._load),
            web.post(f"{prefix}/v1/usage", self._usage),
            web.post(f"{prefix}/v1/wake", self._activate),
            web.get(f"{prefix}/v1/status", self._status),
        ]

    async def close(self, _: web.Application) -> None:
        """End the table streams."""
        self._closing.set()

    async def _table(self, request: web.Request) -> web.StreamResponse:
        publisher = request[CONTROLLER].routing_table
        return await stream_routing_table(request, publisher, closing=self._closing)

    async def _load(self, request: web.Request) -> web.Response:
        controller = request[CONTROLLER]
        known = controller.model.functions
        report = parse_load_report(await request.read(), known=known)
        if controller.load_reports.is_full(report.router):
            raise invalid_field("router", report.router, "fewer routers")
        controller.add_load_report(report)
        return web.Response(status=204)

    async def _usage(self, request: web.Request) -> web.Response:
        controller = request[CONTROLLER]
        report = parse_usage_report(await request.read())
        if not controller.usage_ledger.has_capacity_for(report.tenants):
            raise invalid_field("tenants", len(report.tenants), "fewer tenants in all")
        controller.add_usage_report(report)
        return web.json_response(controller.usage_ledger.cluster_totals().to_json())

    async def _activate(self, request: web.Request) -> web.Response:
        controller = request[CONTROLLER]
        known = controller.model.functions
        functions = parse_activation_request(await request.read(), known=known)
        controller.activate(functions, traceparent=request.headers.get(TRACEPARENT, ""))
        return web.Response(status=202)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(await controller_status(request[CONTROLLER]))


async def stream_routing_table(
    request: web.Request, publisher: RoutingTablePublisher, *, closing: asyncio.Event
) -> web.StreamResponse:
    """Answer GET /v1/table until the reader disconnects or the stream is closed.

    Args:
        request: the request; it names the version that the reader has.
        publisher: the routing table.
        closing: set when the server shuts down.
    """
    version = _requested_version(request, publisher)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    publisher.n_watchers += 1
    try:
        while not closing.is_set() and not publisher.is_closed:
            message, version = _next_message(publisher, version)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(json.dumps(message.to_json()).encode() + b"\n")
            await _wait_for_any(
                publisher.wait_for_newer(version), closing.wait(), timeout_s=KEEPALIVE_INTERVAL_S
            )
    except TimeoutError:
        logger.warning(
            "routing table stream closed: client accepted no bytes for %g s", WRITE_TIMEOUT_S
        )
    except ConnectionError as error:
        logger.info("routing table stream ended: %s", error)
    finally:
        publisher.n_watchers -= 1
    return response


def _requested_version(request: web.Request, publisher: RoutingTablePublisher) -> int | None:
    """Return the version that the reader has; None if it has none of this epoch."""
    version = request.query.get("version", "")
    is_number = version.isdecimal() and len(version) <= MAX_VERSION_DIGITS
    if request.query.get("epoch") != publisher.epoch or not is_number:
        return None
    return int(version)


def _next_message(
    publisher: RoutingTablePublisher, version: int | None
) -> tuple[TableMessage, int]:
    """Return the next message for a reader at this version, and the version that it has then."""
    changes = None if version is None else publisher.changes_since(version)
    message: TableMessage
    if changes is None:
        position = TableVersion(publisher.epoch, publisher.version)
        message = TableSnapshot(position, publisher.table)
    elif changes:
        message = TableUpdate(publisher.version, changes)
    else:
        message = Ping(publisher.version)
    return message, publisher.version


async def _wait_for_any(*awaitables: Awaitable[object], timeout_s: float) -> None:
    """Wait until one of these has finished or the time is over; cancel the rest."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
