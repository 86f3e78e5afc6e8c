"""The gateway's ASGI app over several models: whose request it is, what it may do, where it goes.

Requests name their model in the body. A model that does not exist and one that the tenant may not
use are the same 404. `/v1/models` and `/v1/usage` are answered by the gateway (`own_answers`);
everything else goes to a router of the model, with the tenant's name instead of its key.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from faasmoe_contracts.gateway_file import GatewayFile, TenantEntry
from faasmoe_contracts.tls import TlsFolder
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.call import Call, read_call
from faasmoe_gateway.config_follower import ConfigFollower
from faasmoe_gateway.connections import KNOWN_CLIENT_EXTENSION
from faasmoe_gateway.control_link import ControlLink
from faasmoe_gateway.credentials import header_value, shown_key
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.held_request import ClientGone, HeldRequest, HoldBudget
from faasmoe_gateway.lease_client import LeaseClient
from faasmoe_gateway.limits import Hold
from faasmoe_gateway.metrics import (
    CANCELLED,
    FAILED,
    GATEWAY_ERROR,
    NO_ROUTER,
    SHUTDOWN,
    GatewayMetrics,
    RequestRecord,
)
from faasmoe_gateway.model_routes import ModelRoute
from faasmoe_gateway.own_answers import OwnAnswers
from faasmoe_gateway.refusal import (
    Refusal,
    invalid_api_key,
    model_not_found,
    send_json,
    unknown_path,
)
from faasmoe_gateway.relay import (
    ClientResponse,
    Relay,
    RequestFailed,
    RouterAddress,
    WaitingRequests,
    is_page_path,
)
from faasmoe_gateway.request_body import MAX_BODY_BYTES
from faasmoe_gateway.request_span import begin_request_span, recording_status
from faasmoe_gateway.router_pool import RouterPool
from faasmoe_gateway.sender_turns import TURNS_PER_SENDER, SenderTurns
from faasmoe_gateway.tenant_directory import REFRESH_INTERVAL_S, TenantDirectory
from faasmoe_gateway.turn_pacing import TurnPacing
from faasmoe_tracing import NO_TRACER, Span, Tracer

logger = logging.getLogger(__name__)

SAVE_INTERVAL_S = 5.0
UNKNOWN_TENANT = 401  # of a router
MAX_RENEWALS = 3  # of leases for one request: one for each limit that it needs tokens of
_TENANT_PATH = re.compile(r"/([^/]+)(/v1(?:/.*)?)", re.DOTALL)

Taken = TypeVar("Taken")


class Front:
    """The app of a gateway with several models.

    Args:
        directory: models and tenants.
        accounts: the tenants' usage, budgets and limits.
        front_token: what to show routers.
        hold_timeout_s: how long requests wait for a router that is away.
        demand: reports requests to whoever starts routers; None if they are always there.
        leases: renews leases of limits; None if this is the only gateway.
        config_link: where models and tenants come from; None if they do not change.
        page: where the live page is; None for none.
        budget: bounds what all requests hold.
        metrics: counts requests.
        tls: certificate to show routers that have some; None if they have none.
        tracer: traces requests.
        clock: returns monotonic seconds.
        wall_clock: returns seconds since the epoch.
    """

    def __init__(
        self,
        directory: TenantDirectory,
        accounts: Accounts,
        *,
        front_token: str,
        hold_timeout_s: float,
        demand: DemandReporter | None = None,
        leases: LeaseClient | None = None,
        config_link: ControlLink | None = None,
        page: RouterAddress | None = None,
        budget: HoldBudget | None = None,
        metrics: GatewayMetrics | None = None,
        tls: TlsFolder | None = None,
        tracer: Tracer = NO_TRACER,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tls = tls
        self._directory = directory
        self._accounts = accounts
        self._demand = demand or DemandReporter(None)
        self._leases = leases
        self._page = page
        self._budget = budget or HoldBudget()
        self._tracer = tracer
        self._clock = clock
        self._wall_clock = wall_clock
        self._own = OwnAnswers(directory, accounts, created_s=int(wall_clock()))
        self._front_token = front_token
        self._hold_timeout_s = hold_timeout_s
        self._metrics = metrics or GatewayMetrics()
        self._follower = None
        if config_link is not None:
            self._follower = ConfigFollower(config_link, self.configure)
        self._pool = RouterPool()
        self._routes: dict[str, ModelRoute] = {}
        self._replace_routes()
        if config_link is None:  # else all routers of the file run
            self._demand.on_routers = self._set_running
        self._turns = SenderTurns(n_per_sender=TURNS_PER_SENDER, pacing=TurnPacing())
        self._running: set[asyncio.Task[None]] = set()
        self._aborted: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
            return
        if scope["path"] in ("/health", "/ping"):
            await send_json(send, b'{"status":"ok"}')
            return
        request = HeldRequest(scope, receive, self._budget)
        with begin_request_span(self._tracer, scope) as span:
            request.hand_on(span.traceparent)
            send = recording_status(send, span)
            try:
                if self._page is not None and is_page_path(scope["raw_path"]):
                    await self._relay_page(self._page, request, send)
                else:
                    await self._count(scope, request, send, span)
            finally:
                request.release()

    async def _count(self, scope: Scope, request: HeldRequest, send: Send, span: Span) -> None:
        """Handle one request, and count how it ends."""
        record = RequestRecord(self._clock())
        try:
            await self._handle(scope, request, send, span, record)
        except Refusal as refusal:
            record.refuse(refusal)
            await refusal.send(send, scope["path"])
        except ClientGone:
            record.end(CANCELLED)
        except Exception:  # the server logs it
            record.end(FAILED, GATEWAY_ERROR)
            raise
        finally:
            self._metrics.count(record)

    async def _relay_page(self, page: RouterAddress, request: HeldRequest, send: Send) -> None:
        client = ClientResponse(send, is_messages=False)
        take_turn = partial(self._turns.take, "")
        waiting, pool = WaitingRequests(), self._pool
        relay = Relay(request, client, page, waiting, pool=pool, take_turn=take_turn)
        with suppress(ClientGone):
            await self._run(relay, request, client, RequestRecord(self._clock()))

    def abort_running(self) -> None:
        """End every response with an error, because the server is shutting down."""
        self._aborted |= self._running
        for task in self._running:
            task.cancel()

    def configure(self, file: GatewayFile) -> None:
        """Take other models and tenants; requests that run go on as they began."""
        self._accounts.configure(file.tenants, self._clock())
        self._directory.replace(file, self._wall_clock())
        self._replace_routes()

    def waiting(self) -> list[tuple[str, int]]:
        """Return the requests that wait for a router, by model."""
        return [(model, route.waiting.n) for model, route in list(self._routes.items())]

    def _replace_routes(self) -> None:
        known, self._routes = self._routes, {}
        for name, model in self._directory.models.items():
            route = known.get(name)
            if route is None:
                route = ModelRoute(
                    model,
                    front_token=self._front_token,
                    hold_timeout_s=self._hold_timeout_s,
                    demand=self._demand,
                    tls=self._tls,
                )
            else:
                route.replace_routers(model)
            self._routes[name] = route
        self._metrics.configure(self._directory.models.keys(), self._directory.tenants.keys())

    def _set_running(self, routers: Mapping[str, tuple[str, ...]]) -> None:
        for model, route in self._routes.items():
            if model in routers:
                route.set_running(routers[model])

    async def _handle(
        self, scope: Scope, request: HeldRequest, send: Send, span: Span, record: RequestRecord
    ) -> None:
        with span.child("auth"):
            tenant, path = self._authenticate(scope)
        record.tenant = "" if tenant is None else tenant.name
        if tenant is not None and KNOWN_CLIENT_EXTENSION in scope.get("extensions", {}):
            scope["extensions"][KNOWN_CLIENT_EXTENSION]()
        if scope["method"] in ("GET", "HEAD"):
            await send_json(send, self._own.answer(path, tenant, self._wall_clock()))
            return
        account = None if tenant is None else self._accounts.of(tenant.name)
        headers: dict[str, str] = {}
        if account is not None:
            limiter = account.limiter
            with span.child("limit"):
                await self._take(lambda: limiter.count_request(self._clock()))
                headers = account.check_budgets(self._wall_clock())
        body_start_s = self._clock()
        body = await request.read_body(MAX_BODY_BYTES)
        record.body_s = self._clock() - body_start_s
        encoding = header_value(scope, b"content-encoding").strip().lower()
        call = await read_call(
            body, path, tenant, account, encoding=encoding, directory=self._directory
        )
        record.model = call.model.name
        request.address(path, tenant=record.tenant)
        client = ClientResponse(send, is_messages=path.endswith("/v1/messages"))
        client.headers = headers
        await self._relay(call, request, client, span, record)

    def _authenticate(self, scope: Scope) -> tuple[TenantEntry | None, str]:
        """Return the tenant and the path without its name; raises Refusal."""
        path = scope["path"]
        match = None if path.startswith("/v1/") else _TENANT_PATH.fullmatch(path)
        named = None if match is None else match[1]
        if self._directory.is_open:
            if named is not None:
                raise unknown_path(path)
            return None, path
        tenant = self._directory.authenticate(shown_key(scope))
        host = self._directory.tenant_of_host(_host_name(scope))
        if tenant is None or {named, host} - {None, tenant.name}:
            raise invalid_api_key()
        return tenant, path if match is None else match[2]

    async def _relay(
        self,
        call: Call,
        request: HeldRequest,
        client: ClientResponse,
        span: Span,
        record: RequestRecord,
    ) -> None:
        hold = Hold([])
        generates = call.generates
        if call.account is not None and generates:
            limiter = call.account.limiter
            with span.child("limit"):
                hold = await self._take(
                    lambda: limiter.hold(
                        call.max_input_tokens, call.max_output_tokens, self._clock()
                    )
                )
            client.headers |= limiter.headers(self._clock())
        n_tokens = call.max_input_tokens + call.max_output_tokens
        route = self._routes.get(call.model.name)
        if route is None:  # removed while the request came
            hold.correct(0, 0, self._clock())
            raise model_not_found(call.model.served_name)
        affinity = call.affinity if generates else b""
        with route.reserve(affinity, n_tokens) as reserved:

            def on_head() -> None:
                if relay.status == UNKNOWN_TENANT and call.tenant is not None:
                    # The gateway knows a new Tenant up to a minute earlier than routers' files do.
                    raise RequestFailed("The model does not know this tenant yet; try again.")
                if relay.meter.input_tokens is not None:
                    hold.correct(relay.meter.input_tokens, call.max_output_tokens, self._clock())

            sender = "" if call.tenant is None else call.tenant.name
            relay = Relay(
                request,
                client,
                route.unchosen,
                route.waiting,
                pool=self._pool,
                take_turn=partial(self._turns.take, sender),
                keeps_turn=call.tenant is not None,
                choose=reserved.choose,
                on_head=on_head,
                span=span,
            )
            record.overhead_s = self._clock() - record.started_s - record.body_s
            try:
                await self._run(relay, request, client, record)
            finally:
                self._settle(call, hold, relay)

    async def _take(self, take: Callable[[], Taken]) -> Taken:
        """Take tokens of limits, with further leases if they do not suffice; raises Refusal."""
        for _ in range(MAX_RENEWALS):
            try:
                return take()
            except Refusal as refusal:
                if refusal.status != 429 or self._leases is None or not await self._leases.renew():
                    raise
        return take()

    def _settle(self, call: Call, hold: Hold, relay: Relay) -> None:
        meter = relay.meter
        input_tokens = meter.input_tokens or 0
        hold.correct(input_tokens, meter.output_tokens, self._clock())
        if call.account is not None and meter.input_tokens is not None:
            name = call.model.name
            call.account.record(self._wall_clock(), name, input_tokens, meter.output_tokens)

    async def _run(
        self, relay: Relay, request: HeldRequest, client: ClientResponse, record: RequestRecord
    ) -> None:
        """Relay until the response is complete, the client has hung up or the server ends."""
        task = asyncio.create_task(relay.run())
        watcher = asyncio.create_task(request.wait_until_gone())
        self._running.add(task)
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task in self._aborted:
                record.end(FAILED, SHUTDOWN)
                await client.fail("The server is shutting down.", status=503)
            elif task.done():
                task.result()
                record.read_status(relay.status)
                if relay.has_failed:
                    record.end(FAILED, NO_ROUTER)
            else:
                record.end(CANCELLED)
        finally:
            record.waited_s = relay.waited_s
            self._running.discard(task)
            self._aborted.discard(task)
            for running in (task, watcher):
                running.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        work: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._refresh,
            self._save,
            self._demand.run,
        ]
        if self._leases is not None:
            work.append(self._leases.run)
        if self._follower is not None:
            work.append(self._follower.run)
        jobs = [asyncio.create_task(job()) for job in work]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        self._pool.close()
        await self._save_now()
        await send({"type": "lifespan.shutdown.complete"})

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            if self._follower is None:
                await asyncio.to_thread(self._directory.refresh, self._wall_clock())
            else:  # keys are in the file: nothing is read, only expiry is checked
                self._directory.refresh(self._wall_clock())

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL_S)
            await self._save_now()

    async def _save_now(self) -> None:
        content = self._accounts.changed(self._wall_clock())
        if content is None:
            return
        try:
            await asyncio.to_thread(self._accounts.write, content)
        except OSError as error:
            logger.error("The tenants' usage cannot be saved: %s", error)


def _host_name(scope: Scope) -> str:
    """Return the name in the Host header, without the port."""
    host = header_value(scope, b"host")
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
