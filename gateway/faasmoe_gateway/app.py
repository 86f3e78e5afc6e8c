"""The gateway's ASGI app: one relay per request, until its client has left."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.types import Receive, Scope, Send

from faasmoe_gateway.connections import KNOWN_CLIENT_EXTENSION
from faasmoe_gateway.credentials import KnownCredentials, shown_key
from faasmoe_gateway.held_request import ClientGone, HeldRequest, HoldBudget
from faasmoe_gateway.relay import (
    MESSAGES_PATH,
    ClientResponse,
    Relay,
    RouterAddress,
    WaitingRequests,
    is_page_path,
)
from faasmoe_gateway.request_span import begin_request_span, recording_status
from faasmoe_gateway.router_pool import RouterPool
from faasmoe_gateway.sender_turns import TURNS_PER_SENDER, SenderTurns
from faasmoe_gateway.turn_pacing import TurnPacing
from faasmoe_tracing import NO_TRACER, Span, Tracer


class GatewayApp:
    """The app of a gateway with one router.

    Args:
        router: where the router is.
        page: where the live page is; None for none.
        turns: how many requests of a sender are handed on at once.
        budget: bounds what all requests hold.
        tracer: traces requests.
        pool: connects to the router.
    """

    def __init__(
        self,
        router: RouterAddress,
        budget: HoldBudget | None = None,
        *,
        page: RouterAddress | None = None,
        tracer: Tracer = NO_TRACER,
        turns: SenderTurns | None = None,
        pool: RouterPool | None = None,
    ) -> None:
        self._router = router
        self._tracer = tracer
        self._page = page
        self._budget = budget or HoldBudget()
        self._waiting = WaitingRequests()
        self._pool = pool or RouterPool()
        self._turns = turns or SenderTurns(n_per_sender=TURNS_PER_SENDER, pacing=TurnPacing())
        self._credentials = KnownCredentials()
        self._running: set[asyncio.Task[None]] = set()
        self._aborted: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
            return
        with begin_request_span(self._tracer, scope) as span:
            await self._handle(scope, receive, recording_status(send, span), span)

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._pool.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _handle(self, scope: Scope, receive: Receive, send: Send, span: Span) -> None:
        request = HeldRequest(scope, receive, self._budget)
        request.hand_on(span.traceparent)
        is_messages = scope["raw_path"].endswith(MESSAGES_PATH)
        client = ClientResponse(send, is_messages=is_messages)
        key = shown_key(scope)
        relay = Relay(
            request,
            client,
            self._upstream(scope["raw_path"]),
            self._waiting,
            pool=self._pool,
            take_turn=partial(self._turns.take, self._credentials.sender(key)),
            keeps_turn=bool(key),
            span=span,
        )
        task = asyncio.create_task(relay.run())
        self._running.add(task)
        try:
            await _run_until_gone(task, request)
            if task in self._aborted:
                await client.fail("The server is shutting down.", status=503)
        finally:
            self._running.discard(task)
            self._aborted.discard(task)
            request.release()
        if relay.is_authenticated:
            self._credentials.add(key)
            scope.get("extensions", {}).get(KNOWN_CLIENT_EXTENSION, lambda: None)()

    def _upstream(self, path: bytes) -> RouterAddress:
        """Return who answers a path."""
        return self._page if self._page is not None and is_page_path(path) else self._router

    def abort_running(self) -> None:
        """End every response with an error, because the server is shutting down."""
        self._aborted |= self._running
        for task in self._running:
            task.cancel()


async def _run_until_gone(task: asyncio.Task[None], request: HeldRequest) -> None:
    """Wait for a relay; cancel it when the client has hung up."""
    watcher = asyncio.create_task(request.wait_until_gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            task.result()
    except ClientGone:
        return
    finally:
        for running in (task, watcher):
            running.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
