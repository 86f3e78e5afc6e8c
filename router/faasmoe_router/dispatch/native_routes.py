"""Which functions are called natively, and how: the table that the native side of calls reads.

Pure: what is known of addresses, mailboxes and this process's functions comes as arguments, the
time too. `build_routes` turns a routing into native routes; `Suspensions` remembers which layers of
a sandbox are not computed natively for now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_kernels.layer_calls import MAX_REPLICAS, LayerRoutes, Route
from faasmoe_router.dispatch.routing import LayerRouting, RoutingIndex

FIRST_SUSPENSION_S = 1.0
MAX_SUSPENSION_S = 60.0

LocalHandles = Mapping[tuple[int, FunctionSpec], int]
"""Handles of the functions that this process computes, by layer and function."""


class Suspensions:
    """Layers of sandboxes that go over HTTP for now, because a mailbox declined them.

    Attributes:
        version: increases whenever the active suspensions change.
    """

    def __init__(self) -> None:
        self.version = 0
        self._until_s: dict[tuple[str, int], float] = {}
        self._delay_s: dict[tuple[str, int], float] = {}

    def suspend(self, address: str, layer: int, now_s: float) -> None:
        """Suspend a layer of a sandbox, for twice as long as the last time."""
        key = (address, layer)
        delay_s = min(2 * self._delay_s.get(key, FIRST_SUSPENSION_S / 2), MAX_SUSPENSION_S)
        self._delay_s[key], self._until_s[key] = delay_s, now_s + delay_s
        self.version += 1

    def expire(self, now_s: float) -> None:
        """End the suspensions that are over."""
        if not self._until_s:
            return
        for key in [k for k, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[key]
            self.version += 1

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        for key in [k for k in self._delay_s if k[0] not in addresses]:
            del self._delay_s[key]
            if self._until_s.pop(key, None) is not None:
                self.version += 1

    def is_suspended(self, address: str, layer: int) -> bool:
        """Return whether calls of this layer go over HTTP."""
        return (address, layer) in self._until_s


class FunctionNumbers:
    """Numbers functions for the native totals; a number is never used again."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, function_id: str) -> int:
        """Return the number of a function."""
        return self._numbers.setdefault(function_id, len(self._numbers))

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield each function with its number; safe from any thread."""
        yield from list(self._numbers.items())


def build_routes(
    routing: RoutingIndex,
    *,
    mailboxes: Mapping[str, int],
    excluded: Callable[[Sequence[str]], Set[str]],
    is_suspended: Callable[[str, int], bool],
    local: LocalHandles,
    numbers: FunctionNumbers,
) -> list[LayerRoutes]:
    """Return the native routes of all layers.

    A function is called natively only if all of its addresses that may be called now have a
    mailbox, so that replicas on other machines get their share of the calls.

    Args:
        routing: the current routing.
        mailboxes: handle of each address with a mailbox.
        excluded: returns those of a function's addresses that must not be called now, or more.
        is_suspended: whether a layer of a sandbox goes over HTTP for now.
        local: the functions that this process computes.
        numbers: numbers of functions.
    """

    def handles(addresses: Sequence[str], layer: int) -> tuple[int, ...]:
        usable = [a for a in addresses if a not in excluded(addresses)]
        if not all(a in mailboxes and not is_suspended(a, layer) for a in usable):
            return ()
        return tuple(mailboxes[a] for a in usable) if len(usable) <= MAX_REPLICAS else ()

    def layer_routes(index: int, layer: LayerRouting) -> LayerRoutes:
        routes = tuple(
            Route(
                numbers.number(entry.spec.id),
                entry.spec.id,
                handles(entry.addresses, index),
                local.get((index, entry.spec), 0),
            )
            for entry in layer.functions
        )
        function_of = layer.function_of
        return LayerRoutes(function_of.ctypes.data, len(function_of), routes)

    return [layer_routes(index, layer) for index, layer in enumerate(routing.layers)]
