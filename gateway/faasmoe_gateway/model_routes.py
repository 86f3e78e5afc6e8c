"""The models behind the gateway: their routers, and the load that each has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from faasmoe_contracts.gateway_file import ModelEntry
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.relay import RouterAddress, WaitingRequests
from faasmoe_gateway.router_choice import HashRing, choose_router


class ModelRoute:
    """The routers of one model.

    Args:
        model: the model.
        front_token: what to show its routers.
        hold_timeout_s: how long requests wait while none listens.
        demand: where requests are counted.

    Attributes:
        waiting: the requests that wait for a router.
    """

    def __init__(
        self, model: ModelEntry, *, front_token: str, hold_timeout_s: float, demand: DemandReporter
    ) -> None:
        self.waiting = WaitingRequests()
        self._model = model.name
        self._demand = demand
        self._addresses = {
            router.name: RouterAddress(Path(router.path), front_token, hold_timeout_s)
            for router in model.routers
        }
        self._ring = HashRing(self._addresses)
        self._outstanding: dict[str, int] = {}

    def set_running(self, routers: Collection[str]) -> None:
        """Choose among these routers only; if there are none, requests wait for the first one."""
        known = [name for name in routers if name in self._addresses]
        self._ring = HashRing(known or [next(iter(self._addresses))])

    @contextmanager
    def reserve(self, key: bytes, n_tokens: int) -> Iterator[Reservation]:
        """Choose a router, which has a request's tokens outstanding within the context.

        Args:
            key: what the request shares with others of its session or prefix; empty for nothing.
            n_tokens: the most tokens that it may have.
        """
        reservation = Reservation(self, key, n_tokens)
        try:
            with self._demand.request(self._model):
                yield reservation
        finally:
            reservation.release()

    def takes_requests(self, router: str) -> bool:
        """Return whether a router takes requests."""
        return router in self._ring.routers

    def take(self, key: bytes, n_tokens: int) -> tuple[str, RouterAddress, ExitStack]:
        """Choose a router; return its name, where it is, and what ends its use."""
        name = choose_router(self._ring, self._outstanding, key)
        stack = ExitStack()
        self._outstanding[name] = self._outstanding.get(name, 0) + n_tokens
        stack.callback(self._give_back, name, n_tokens)
        stack.enter_context(self._demand.sent(self._model, name))
        return name, self._addresses[name], stack

    def _give_back(self, name: str, n_tokens: int) -> None:
        self._outstanding[name] -= n_tokens


class Reservation:
    """The router of one request, another one if that ends before the request does.

    Args:
        route: the model's routers.
        key: what the request shares with others.
        n_tokens: the most tokens that it may have.

    Attributes:
        address: where the router is.
    """

    def __init__(self, route: ModelRoute, key: bytes, n_tokens: int) -> None:
        self._route = route
        self._key = key
        self._n_tokens = n_tokens
        self._name, self.address, self._use = route.take(key, n_tokens)

    def move(self) -> RouterAddress:
        """Return where to go on: elsewhere if the router takes no requests any more."""
        if not self._route.takes_requests(self._name):
            self.release()
            self._name, self.address, self._use = self._route.take(self._key, self._n_tokens)
        return self.address

    def release(self) -> None:
        """End the use of the router."""
        self._use.close()
