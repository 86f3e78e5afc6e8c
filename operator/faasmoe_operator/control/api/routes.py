"""The function table as an endless stream of JSON lines.

A reader that is slow holds up nothing: it is told what changed since its last line when it is ready
for the next one. One that takes no bytes at all is cut.

What a model's routers ask and tell: function table, load reports, usage, wakes, status.

Which model is meant, and that the caller may speak of it, was found out before.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from faasmoe_operator.control.api.requests import (
    invalid_field,
    parse_activation_request,
    parse_load_report,
    parse_usage_report,
)
from faasmoe_operator.control.api.status import controller_status
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.routing_table import RoutingTablePublisher

logger = logging.getLogger(__name__)


KEEPALIVE_INTERVAL_S = 5.0
WRITE_TIMEOUT_S = 30.0


async def stream_routing_table(
    request: web.Request, publisher: RoutingTablePublisher, *, closing: asyncio.Event
) -> web.StreamResponse:
    """Answer GET /v1/table until the reader goes or the control ends."""
    version = _requested_version(request, publisher)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    publisher.n_watchers += 1
    try:
        while not closing.is_set() and not publisher.is_closed:
            line, version = _next_line(publisher, version)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(json.dumps(line).encode() + b"\n")
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
    """Return the version that the reader has; None if it has none of this control's."""
    version = request.query.get("version", "")
    if (
        request.query.get("epoch") != publisher.epoch
        or not version.isdecimal()
        or len(version) > 18
    ):
        return None
    return int(version)


def _next_line(publisher: RoutingTablePublisher, version: int | None) -> tuple[dict[str, Any], int]:
    """Return what a reader at this version is told, and the version that it has then."""
    changes = None if version is None else publisher.changes_since(version)
    if changes is None:
        table = publisher.table.to_json()
        line = {
            "kind": "snapshot",
            "epoch": publisher.epoch,
            "version": publisher.version,
            "table": table,
        }
    elif changes:
        functions = [{"id": name, "addresses": list(a)} for name, a in changes.items()]
        line = {"kind": "change", "version": publisher.version, "functions": functions}
    else:
        line = {"kind": "ping", "version": publisher.version}
    return line, publisher.version


async def _wait_for_any(*awaitables: Awaitable[object], timeout_s: float) -> None:
    """Wait until one of these has ended, or the time has passed."""
    tasks = [asyncio.ensure_future(work) for work in awaitables]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


CONTROLLER = web.RequestKey("controller", Controller)
"""Where a request carries the controller of the model that it is about."""

ROUTE_NAMES = ("table", "load", "usage", "wake", "status")


class ModelRoutes:
    """The routes of a model's own API."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()

    def route_defs(self, prefix: str) -> list[web.RouteDef]:
        """Return the routes, their paths below a prefix."""
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
        return await stream_routing_table(
            request, _controller(request).routing_table, closing=self._closing
        )

    async def _load(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        known = controller.model.functions
        report = parse_load_report(await request.read(), known=known)
        if controller.load_reports.is_full(report.router):
            raise invalid_field("router", report.router, "fewer routers")
        controller.add_load_report(report)
        return web.Response(status=204)

    async def _usage(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        statement = parse_usage_report(await request.read())
        ledger = controller.usage_ledger
        if not ledger.has_capacity_for(statement.tenants):
            raise invalid_field("tenants", len(statement.tenants), "fewer tenants in all")
        controller.add_usage_report(statement)
        accounts = {name: asdict(use) for name, use in ledger.usage_by_tenant.items()}
        return web.json_response({"since_s": ledger.since_s, "tenants": accounts})

    async def _activate(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        known = controller.model.functions
        functions = parse_activation_request(await request.read(), known=known)
        controller.activate(functions)
        return web.Response(status=202)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(await controller_status(_controller(request)))


def _controller(request: web.Request) -> Controller:
    return request[CONTROLLER]
