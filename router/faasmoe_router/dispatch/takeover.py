"""Takeover: functions that have lost their sandboxes are computed natively in this process.

Until they are replaced, the general path computes them from the store (local_functions.py), and
with them every layer that needs one would take that path as a whole. What it has computed joins the
native path here, for as long as it would compute it at once: while every address of the function is
ejected, for a while after it has lost the last one, and until its replacement's mailbox is open.
Whoever needs a function later than that waits for its activation, which only the general path does.

A sandbox that is lost has functions of many layers, and each would send its layer to the general
path once. So the first of these layers maps what the others need, too, as far as that is quick.
Functions without an address are requested meanwhile, so that they are replaced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Set

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.verification import OutOfTime
from faasmoe_router.dispatch.endpoint_health import EndpointHealth
from faasmoe_router.dispatch.local_functions import MAX_MAPPED_FUNCTIONS, LocalFunctions
from faasmoe_router.dispatch.overflow import Selection
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted, StoreUnreadable

logger = logging.getLogger(__name__)

MAP_BUDGET_S = 0.03
"""How long one layer may map for others: a function takes a millisecond, if its bytes need not be
verified. Verification stops between two experts, and goes on there the next time."""

WasLost = Callable[[str, float], bool]
"""Whether a function has lost all of its addresses, shortly before a monotonic time."""

RequestFunctions = Callable[[RoutingIndex, Iterable[str], float], None]
"""Requests those of these functions that have no address, at a monotonic time."""


class TakenOverFunctions:
    """The functions that this process computes in place of their sandboxes.

    Belongs to the engine's thread, except for `mapped`.

    Args:
        functions: what the general path has computed from the store.
        health: says which addresses are ejected.
        was_lost: whether a function was lost; asked only about those that have no address, or only
            such whose mailbox is being opened.
        wait_s: how long calls wait for another address after an ejection.
        request: requests functions that have no address; called once a pass.
    """

    def __init__(
        self,
        functions: LocalFunctions,
        *,
        health: EndpointHealth,
        was_lost: WasLost,
        request: RequestFunctions,
        wait_s: float = 0.0,
    ) -> None:
        self._functions = functions
        self._health = health
        self._was_lost = was_lost
        self._wait_s = wait_s
        self._request = request
        self._taken: dict[FunctionSpec, ExpertFunction] = {}
        self._selection: Selection = {}

    def map_lost(
        self,
        routing: RoutingIndex,
        now_s: float,
        *,
        opening: Set[str] = frozenset(),
        first_layer: int = 0,
    ) -> None:
        """Map the functions that were lost, for no longer than MAP_BUDGET_S; the rest as needed.

        Args:
            routing: the current routing.
            now_s: monotonic time.
            opening: addresses whose mailboxes are being opened.
            first_layer: the layer that will need them first.
        """
        mapped, end_s = set(self._functions.mapped()), time.monotonic() + MAP_BUDGET_S
        for layer in (*routing.layers[first_layer:], *routing.layers[:first_layer]):
            for entry in layer.functions:
                if entry.spec in mapped or not self._is_lost(entry, entry.spec, now_s, opening):
                    continue
                if len(mapped) >= MAX_MAPPED_FUNCTIONS or time.monotonic() > end_s:
                    return
                try:
                    self._functions.map(entry.spec, until_s=end_s)
                except OutOfTime:
                    return
                except (
                    StoreCorrupted,
                    StoreUnreadable,
                ) as error:  # no request's, until one needs it
                    logger.warning("A lost function cannot be mapped: %s", error)
                    return
                mapped.add(entry.spec)

    @property
    def mapped(self) -> frozenset[FunctionSpec]:
        """Functions that are mapped now; safe from any thread."""
        return frozenset(self._functions.mapped())

    def selection(
        self, routing: RoutingIndex, now_s: float, opening: Set[str] = frozenset()
    ) -> Selection:
        """Return what this process computes, by layer; replaced when it changes, never modified.

        Arguments as for `map_lost`.
        """
        mapped = self._functions.mapped()
        taken = {
            spec: function
            for spec, function in mapped.items()
            if self._is_lost(routing.entries.get(spec.id), spec, now_s, opening)
        }
        if taken != self._taken:
            self._taken = taken
            self._selection = {
                (layer, spec): function for spec, function in taken.items() for layer in spec.layers
            }
        return self._selection

    def request_replacements(self, routing: RoutingIndex, now_s: float) -> None:
        """Request what was selected last and has no address."""
        if self._taken:
            self._request(routing, [spec.id for spec in self._taken], now_s)

    def _is_lost(
        self, entry: FunctionEndpoints | None, spec: FunctionSpec, now_s: float, opening: Set[str]
    ) -> bool:
        if entry is None or entry.spec != spec:
            return False
        excluded = self._health.excluded_addresses(entry.addresses)
        usable = [address for address in entry.addresses if address not in excluded]
        if not set(usable) <= opening:
            return False
        ejected_at_s = [
            s for a in entry.addresses if (s := self._health.ejected_at_s(a)) is not None
        ]
        if len(usable) < len(entry.addresses) and now_s >= max(ejected_at_s) + self._wait_s:
            return True
        return self._was_lost(spec.id, now_s)
