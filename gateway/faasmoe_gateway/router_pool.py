"""Connections to routers that are kept for the next request, so that it pays for no handshake.

A connection that its router has ended meanwhile is not used. One that ends just as it is used says
nothing about the router: the request is sent again over a new one (`KeptConnectionLost`), so only
requests that can be sent again get a kept one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from faasmoe_contracts.tls import TlsPeer
from faasmoe_gateway.upstream import RouterConnection

IDLE_S = 15.0  # much less than routers keep connections, which end few just as they are used
MAX_AGE_S = 300.0  # by then a changed certificate is in use everywhere
MAX_IDLE_PER_ROUTER = 64


@dataclass(frozen=True, slots=True)
class RouterKey:
    """A router as it is connected to.

    Attributes:
        address: a Unix socket, or HOST:PORT.
        tls: how it is known over TCP; None connects without TLS.
    """

    address: str
    tls: TlsPeer | None


class RouterPool:
    """The idle connections to all routers; belongs to one event loop.

    Args:
        idle_s: how long an unused connection is kept.
        max_age_s: how long one is used.
        max_idle_per_router: how many unused ones are kept.
    """

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        max_age_s: float = MAX_AGE_S,
        max_idle_per_router: int = MAX_IDLE_PER_ROUTER,
    ) -> None:
        self._idle_s = idle_s
        self._max_age_s = max_age_s
        self._max_idle_per_router = max_idle_per_router
        self._idle: dict[RouterKey, dict[RouterConnection, asyncio.TimerHandle]] = {}

    async def open(self, router: RouterKey, *, has_body: bool, is_new: bool) -> RouterConnection:
        """Return a connection to a router; raises RouterAway.

        Args:
            router: the router.
            has_body: whether the response has a body; False for HEAD.
            is_new: whether it must be a new one, as the request cannot be sent again.
        """
        kept = None if is_new else self._take(router, has_body=has_body)
        if kept is not None:
            return kept
        return await RouterConnection.open(router.address, has_body=has_body, tls=router.tls)

    def give_back(self, router: RouterKey, connection: RouterConnection) -> None:
        """Keep a connection, or close it if it is of no more use."""
        loop = asyncio.get_running_loop()
        is_young = loop.time() - connection.opened_s < self._max_age_s
        n_idle = len(self._idle.get(router, ()))
        has_place = n_idle < self._max_idle_per_router
        if not (connection.can_be_kept and is_young and has_place):
            connection.close()
            return
        timer = loop.call_later(self._idle_s, self._end, router, connection)
        self._idle.setdefault(router, {})[connection] = timer
        connection.keep(lambda: self._end(router, connection))

    def close(self) -> None:
        """Close all idle connections."""
        for router, connections in list(self._idle.items()):
            for connection in list(connections):
                self._end(router, connection)

    def _take(self, router: RouterKey, *, has_body: bool) -> RouterConnection | None:
        """Return the connection that was used last, if there is one."""
        now_s = asyncio.get_running_loop().time()
        while connections := self._idle.get(router):
            connection = next(reversed(connections))
            self._forget(router, connection)
            is_young = now_s - connection.opened_s < self._max_age_s
            kept = connection.next(has_body=has_body) if is_young else None
            if kept is not None:
                return kept
            connection.close()
        return None

    def _end(self, router: RouterKey, connection: RouterConnection) -> None:
        self._forget(router, connection)
        connection.close()

    def _forget(self, router: RouterKey, connection: RouterConnection) -> None:
        connections = self._idle.get(router, {})
        timer = connections.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if not connections:
            self._idle.pop(router, None)
