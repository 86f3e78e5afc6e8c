"""The models behind the gateway: their routers, and the load that each has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from faasmoe_contracts.gateway_file import ModelEntry
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.tls import TlsFolder, TlsPeer
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
        tls: certificate to show routers with a `tls_name`; None if there are none.

    Attributes:
        waiting: the requests that wait for a router.
    """

    def __init__(
        self,
        model: ModelEntry,
        *,
        front_token: str,
        hold_timeout_s: float,
        demand: DemandReporter,
        tls: TlsFolder | None = None,
    ) -> None:
        self._tls = tls
        self.waiting = WaitingRequests()
        self._model = model.name
        self._front_token = front_token
        self._hold_timeout_s = hold_timeout_s
        self._demand = demand
        self._outstanding: dict[str, int] = {}
        self.replace_routers(model)

    @property
    def unchosen(self) -> RouterAddress:
        """What a request knows of its router before it has chosen one."""
        return RouterAddress("", self._front_token, self._hold_timeout_s)

    def replace_routers(self, model: ModelEntry) -> None:
        """Choose among the model's routers as they are now, all of which run.

        Raises:
            ContractError: they have certificates, and there is none to show them.
        """
        if model.front_token is not None:
            self._front_token = model.front_token
        peer = self._peer(model)
        self._addresses = {
            router.name: RouterAddress(
                router.address, self._front_token, self._hold_timeout_s, peer
            )
            for router in model.routers
        }
        self._ring = HashRing(self._addresses) if self._addresses else None
        gone = self._outstanding.keys() - self._addresses.keys()
        for router in [name for name in gone if not self._outstanding[name]]:
            del self._outstanding[router]

    def _peer(self, model: ModelEntry) -> TlsPeer | None:
        if model.tls_name is None:
            return None
        if self._tls is None:
            expected = "none, as FAASMOE_TLS_FOLDER is not set"
            raise ContractError(f"{model.name}.tls_name", model.tls_name, expected)
        return TlsPeer(self._tls, model.tls_name)

    def set_running(self, routers: Collection[str]) -> None:
        """Choose among these routers only; while there are none, requests wait.

        Nothing is sent to any other: it may be ending.
        """
        known = [name for name in routers if name in self._addresses]
        self._ring = HashRing(known) if known else None

    @contextmanager
    def reserve(self, key: bytes, n_tokens: int) -> Iterator[Reservation]:
        """Let a request choose routers, which have its tokens outstanding within the context.

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
        return self._ring is not None and router in self._ring.routers

    def take(self, key: bytes, n_tokens: int) -> Taken | None:
        """Choose a router; None while there is none that takes requests."""
        if self._ring is None:
            return None
        name = choose_router(self._ring, self._outstanding, key)
        use = ExitStack()
        self._outstanding[name] = self._outstanding.get(name, 0) + n_tokens
        use.callback(self._give_back, name, n_tokens)
        use.enter_context(self._demand.sent(self._model, name))
        return Taken(name, self._addresses[name], use)

    def _give_back(self, name: str, n_tokens: int) -> None:
        self._outstanding[name] -= n_tokens


@dataclass(frozen=True, slots=True)
class Taken:
    """A router that a request uses.

    Attributes:
        name: its name.
        address: where it is.
        use: what ends its use.
    """

    name: str
    address: RouterAddress
    use: ExitStack


class Reservation:
    """The router of one request, another one if that ends before the request does.

    Args:
        route: the model's routers.
        key: what the request shares with others.
        n_tokens: the most tokens that it may have.
    """

    def __init__(self, route: ModelRoute, key: bytes, n_tokens: int) -> None:
        self._route = route
        self._key = key
        self._n_tokens = n_tokens
        self._taken: Taken | None = None

    def choose(self) -> RouterAddress | None:
        """Return where to connect now: as before, if that router still takes requests.

        None while there is none.
        """
        if self._taken is None or not self._route.takes_requests(self._taken.name):
            self.release()
            self._taken = self._route.take(self._key, self._n_tokens)
        return None if self._taken is None else self._taken.address

    def release(self) -> None:
        """End the use of the router."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.use.close()
