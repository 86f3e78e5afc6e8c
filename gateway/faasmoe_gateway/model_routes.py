"""The models behind the gateway: their routers, and the load that each has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faasmoe_contracts.gateway_file import ModelEntry
from faasmoe_gateway.relay import RouterAddress, WaitingRequests
from faasmoe_gateway.router_choice import HashRing, choose_router


class ModelRoute:
    """The routers of one model.

    Args:
        model: the model.
        front_token: what to show its routers.
        hold_timeout_s: how long requests wait while none listens.

    Attributes:
        waiting: the requests that wait for a router.
    """

    def __init__(self, model: ModelEntry, *, front_token: str, hold_timeout_s: float) -> None:
        self.waiting = WaitingRequests()
        self._addresses = {
            router.name: RouterAddress(Path(router.path), front_token, hold_timeout_s)
            for router in model.routers
        }
        self._ring = HashRing(self._addresses)
        self._outstanding: dict[str, int] = {}

    @contextmanager
    def reserve(self, key: bytes, n_tokens: int) -> Iterator[RouterAddress]:
        """Choose a router, which has a request's tokens outstanding within the context.

        Args:
            key: what the request shares with others of its session or prefix; empty for nothing.
            n_tokens: the most tokens that it may have.
        """
        name = choose_router(self._ring, self._outstanding, key)
        self._outstanding[name] = self._outstanding.get(name, 0) + n_tokens
        try:
            yield self._addresses[name]
        finally:
            self._outstanding[name] -= n_tokens
