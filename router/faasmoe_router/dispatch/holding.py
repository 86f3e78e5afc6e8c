"""Calls that wait: for functions that are being started, and for replicas in a dead one's place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_expert.table import FunctionEntry
from faasmoe_router.dispatch.errors import CallError, NotYetThere
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.patience import Patience
from faasmoe_router.dispatch.resilience import AddressBook
from faasmoe_router.dispatch.routing import Routing

Failures = dict[int, CallError | None]
"""Why each position got no part; None for want of an address."""


@dataclass(frozen=True, slots=True)
class Holding:
    """How calls wait for functions that are being started.

    Attributes:
        wake: asks for functions, in the order in which they are needed; must not block.
        timeout_s: how long calls wait for a function, all together, before it is computed here.
        probe_s: time between two tries of an address that does not accept connections.
        replacement_s: how long calls wait for another address in place of one that was ejected,
            from its ejection on: control sees a dead sandbox too, and a warm one takes its place.
    """

    wake: Callable[[Sequence[str]], None]
    timeout_s: float = 2.0
    probe_s: float = 0.1
    replacement_s: float = 0.25


class Holder:
    """Has calls wait. Belongs to the engine's thread, but for `moved`.

    Args:
        holding: how calls wait.
        book: which addresses were ejected, and when.
        load: where those that wait are counted.
        metrics: counts them too.

    Attributes:
        moved: set when functions have moved, from any thread.
        patience: how long calls wait yet.
    """

    def __init__(
        self, holding: Holding, *, book: AddressBook, load: LoadMeter, metrics: DispatchMetrics
    ) -> None:
        self.moved = threading.Event()
        self.patience = Patience(holding.timeout_s)
        self._holding = holding
        self._book = book
        self._load = load
        self._metrics = metrics

    def hold(
        self,
        entries: Mapping[int, FunctionEntry],
        failures: Failures,
        *,
        n_rows: int,
        routing: Callable[[], Routing],
        try_again: Callable[[Mapping[int, FunctionEntry]], Failures],
        by_s: float,
    ) -> Collection[int]:
        """Wait for functions that are being started; return the positions that got no part.

        Args:
            entries: of each position, the function's addresses as they were tried.
            failures: the positions that have no part.
            n_rows: of the batch, for what the next layers will need.
            routing: returns where the functions are now.
            try_again: calls the functions of these positions.
            by_s: when the layer's time is over.
        """
        left: list[int] = []
        tried = {i: entries[i] for i in failures}
        while True:
            self.moved.clear()
            known, now_s = routing(), time.monotonic()
            self._ask(known, [tried[i].spec.id for i in failures], n_rows, now_s)
            if now_s >= by_s:
                return [*left, *failures]
            waits_s = {
                i: self._wait_s(known.entries.get(tried[i].spec.id), tried[i], error, now_s)
                for i, error in failures.items()
            }
            left += [i for i in failures if waits_s[i] is None]
            held = {i: wait_s for i, wait_s in waits_s.items() if wait_s is not None}
            if not held:
                return left
            with self._counted(len(held)):
                self.moved.wait(min(*held.values(), self._holding.probe_s))
            addresses = routing().entries
            again = {i: addresses.get(tried[i].spec.id, tried[i]) for i in held}
            failures = try_again(again)
            tried |= again

    def _ask(
        self, routing: Routing, function_ids: Iterable[str], n_rows: int, now_s: float
    ) -> None:
        """Ask for the missed functions, and for those that the next layers will miss."""
        missed = dict.fromkeys((*function_ids, *routing.missing_for(n_rows)))
        due = self.patience.miss([name for name in missed if name in routing.entries], now_s)
        away = [name for name in due if not routing.entries[name].addresses]
        if away:
            self._holding.wake(away)

    def _wait_s(
        self,
        entry: FunctionEntry | None,
        tried: FunctionEntry,
        error: CallError | None,
        now_s: float,
    ) -> float | None:
        """Return how long a call may wait before it is tried again, None if it had better not."""
        left_s = self.patience.left_s(tried.spec.id, now_s)
        if entry is None or left_s <= 0:
            return None
        if not entry.addresses:
            return left_s
        if entry.addresses != tried.addresses:
            return 0.0
        if isinstance(error, NotYetThere):
            return left_s
        return self._until_replaced_s(entry, now_s)

    def _until_replaced_s(self, entry: FunctionEntry, now_s: float) -> float | None:
        """Return how long to wait for another address in place of those that were ejected."""
        ejected_s = [s for a in entry.addresses if (s := self._book.ejected_s(a)) is not None]
        left_s = max(ejected_s, default=0.0) + self._holding.replacement_s - now_s
        return left_s if left_s > 0 else None

    @contextmanager
    def _counted(self, n_calls: int) -> Iterator[None]:
        self._load.held = n_calls
        self._metrics.held.set(n_calls)
        try:
            yield
        finally:
            self._load.held = 0
            self._metrics.held.set(0)
