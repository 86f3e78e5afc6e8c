"""What a model's routers ask and tell: function table, load reports, usage, wakes, status.

Which model is meant, and that the caller may speak of it, was found out before.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from aiohttp import web

from faasmoe_operator.control.api.bodies import read_load, read_usage, read_wake
from faasmoe_operator.control.api.errors import invalid
from faasmoe_operator.control.api.status import describe
from faasmoe_operator.control.api.stream import stream_table
from faasmoe_operator.control.controller import Controller

CONTROLLER = web.RequestKey("controller", Controller)
"""Where a request carries the controller of the model that it is about."""

ROUTES = ("table", "load", "usage", "wake", "status")


class Routes:
    """The routes of a model's own API."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()

    def under(self, prefix: str) -> list[web.RouteDef]:
        """Return the routes, their paths below a prefix."""
        return [
            web.get(f"{prefix}/v1/table", self._table),
            web.post(f"{prefix}/v1/load", self._load),
            web.post(f"{prefix}/v1/usage", self._usage),
            web.post(f"{prefix}/v1/wake", self._wake),
            web.get(f"{prefix}/v1/status", self._status),
        ]

    async def close(self, _: web.Application) -> None:
        """End the table streams."""
        self._closing.set()

    async def _table(self, request: web.Request) -> web.StreamResponse:
        return await stream_table(request, _controller(request).feed, closing=self._closing)

    async def _load(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        known = controller.model.functions
        report = read_load(await request.read(), known=known)
        if controller.reports.is_full(report.router):
            raise invalid("router", report.router, "fewer routers")
        controller.take(report)
        return web.Response(status=204)

    async def _usage(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        statement = read_usage(await request.read())
        ledger = controller.ledger
        if not ledger.has_room_for(statement.tenants):
            raise invalid("tenants", len(statement.tenants), "fewer tenants in all")
        controller.settle(statement)
        accounts = {name: asdict(use) for name, use in ledger.accounts.items()}
        return web.json_response({"since_s": ledger.since_s, "tenants": accounts})

    async def _wake(self, request: web.Request) -> web.Response:
        controller = _controller(request)
        known = controller.model.functions
        functions = read_wake(await request.read(), known=known)
        controller.wake(functions)
        return web.Response(status=202)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(await describe(_controller(request)))


def _controller(request: web.Request) -> Controller:
    return request[CONTROLLER]
