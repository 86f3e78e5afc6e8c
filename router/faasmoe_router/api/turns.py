"""Turns of tenants on the event loop: one small request of each is prepared at a time.

Small requests are parsed, validated and tokenized on the event loop, in several steps (`body`,
`preparation`). The middleware has each take a turn of its tenant until it is given to the engine,
refused, or waits for a thread. So a tenant that sends many at once delays its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_gateway.sender_turns import SenderTurns, Turn
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.preparation import INLINE_BYTES, current_turn


class TurnMiddleware:
    """ASGI middleware inside authentication: small requests take turns.

    A request whose client leaves while it waits gets no further. Larger ones need no turn: they
    wait for a thread (`preparation`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = SenderTurns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = await _receive_small_body(receive)
        replayed = _Replay(messages, receive)
        if not _is_whole(messages):
            await self._app(scope, replayed, send)
            return
        turn = await self._wait(get_caller(Request(scope)).tenant, receive)
        if turn is None:
            return
        token = current_turn.set(turn)
        try:
            await self._app(scope, replayed, send)
        finally:
            current_turn.reset(token)
            turn.release()

    async def _wait(self, tenant: str, receive: Receive) -> Turn | None:
        """Return a turn of a tenant; None if the client leaves before."""
        turn = self._turns.ask(tenant)
        if turn.done():
            return turn.result()
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        either: set[asyncio.Future[Any]] = {turn, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                return turn.result()
            self._turns.give_up(turn)
            return None
        except asyncio.CancelledError:
            self._turns.give_up(turn)
            raise
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _receive_small_body(receive: Receive) -> Sequence[Message]:
    """Return the messages up to the end of a body, as far as it is small."""
    messages: list[Message] = []
    n_bytes = 0
    while not messages or (n_bytes <= INLINE_BYTES and messages[-1].get("more_body", False)):
        messages.append(await receive())
        n_bytes += len(messages[-1].get("body", b""))
    return messages


def _is_whole(messages: Sequence[Message]) -> bool:
    """Return whether messages are a whole small body, so that its turn waits for no client."""
    n_bytes = sum(len(message.get("body", b"")) for message in messages)
    last = messages[-1]
    is_end = last["type"] == "http.request" and not last.get("more_body", False)
    return is_end and n_bytes <= INLINE_BYTES


class _Replay:
    """An ASGI receive callable that begins with messages received before."""

    def __init__(self, messages: Sequence[Message], receive: Receive) -> None:
        self._messages = deque(messages)
        self._receive = receive

    async def __call__(self) -> Message:
        return self._messages.popleft() if self._messages else await self._receive()
