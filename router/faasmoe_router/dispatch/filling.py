"""Getting a layer's parts: from functions, from functions that are awaited, or computed here.

Nothing that a sandbox or the network does leaves this module as an error. A call that fails is made
again at the function's other addresses (attempts.py). A function without an address is asked for
and its calls are held for a moment; so are calls to an address that does not accept connections
yet, and, for a shorter one, calls whose addresses were ejected, for a fresh replica to come. What
is left then is computed from the store. Hot functions may be computed here to begin with (hot.py).
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry
from faasmoe_router.dispatch.attempts import Attempts
from faasmoe_router.dispatch.batch import LayerBatch
from faasmoe_router.dispatch.calls import Timeouts
from faasmoe_router.dispatch.errors import CallError, NotYetThere
from faasmoe_router.dispatch.failures import FailureLog
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.hot import HotFunctions
from faasmoe_router.dispatch.in_flight import InFlight
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.patience import Patience
from faasmoe_router.dispatch.resilience import AddressBook, Resilience
from faasmoe_router.dispatch.routing import Routing
from faasmoe_router.errors import StoreCorrupted

Failures = dict[int, CallError | None]
"""Why each position got no part; None for want of an address."""

Meanwhile = Callable[[], None]


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


class Filler:
    """Fills layers. Belongs to the engine's thread, but for `take_routing`.

    Attributes:
        routing: where each function is; one reading of it is consistent.
        load: what is called, for other threads to read.
    """

    def __init__(
        self,
        store: Store,
        routing: Routing,
        *,
        fanout: Fanout,
        metrics: DispatchMetrics,
        holding: Holding | None,
        timeouts: Timeouts | None = None,
        resilience: Resilience | None = None,
        hot: HotFunctions | None = None,
    ) -> None:
        self.routing = routing
        self.load = LoadMeter()
        self._fanout = fanout
        self._metrics = metrics
        self._holding = holding
        self._patience = Patience(holding.timeout_s if holding else 0.0)
        self._local = LocalFunctions(store)
        self._hot = hot
        self._moved = threading.Event()
        self._turns: dict[int, int] = defaultdict(int)  # by layer: spreads calls over replicas
        self._book = AddressBook(resilience or Resilience(), metrics, may_start=holding is not None)
        self._layer_timeout_s = (timeouts or Timeouts()).layer_timeout_s
        self._failures = FailureLog()
        self._seen = routing

    def take_routing(self, routing: Routing) -> None:
        """Let the calls from now on go elsewhere, those that are held too; from any thread."""
        self.routing = routing
        self._fanout.retain(routing.addresses())
        if self._hot is not None:
            self._hot.let_go(routing)
        self._moved.set()

    def fill(
        self,
        batch: LayerBatch,
        layer: int,
        functions: Sequence[FunctionEntry],
        *,
        meanwhile: Meanwhile = lambda: None,
    ) -> None:
        """Get all of the batch's parts.

        Args:
            batch: what is called.
            layer: index of the MoE layer.
            functions: the layer's functions that the batch was grouped by.
            meanwhile: work to do while the first calls are away, or before others are held.
        """
        self._forget_what_left()
        self._book.look_after(time.monotonic())
        self.load.passes += layer == 0
        begun_s = time.monotonic()
        entries = {i: functions[group.function] for i, group in enumerate(batch.groups)}
        here = self._computed_here(batch, layer, functions)
        away = {i: entry for i, entry in entries.items() if i not in here}
        with InFlight(self.load, batch, entries) as in_flight:
            turn = self._turns[layer]
            self._turns[layer] += 1
            by_s = begun_s + self._layer_timeout_s
            refused: list[int] = []

            def work() -> None:
                meanwhile()
                refused.extend(self._compute_here(batch, here, entries, in_flight))

            spare = _Once(work)
            failures = self._try(batch, away, in_flight, turn, by_s, spare)
            spare()
            if refused:
                again = {i: entries[i] for i in refused}
                failures |= self._try(batch, again, in_flight, turn, by_s)
            if failures and self._holding is not None:
                left = self._hold(batch, entries, failures, self._holding, in_flight, by_s)
            else:
                left = failures.keys()
            for i in left:
                self._metrics.local.inc()
                self.load.local += 1
                batch.compute(i, self._local, entries[i].spec)
        if self._hot is not None:
            took_s = time.monotonic() - begun_s
            self._hot.end_layer(layer, took_s, is_clean=not failures and not refused)

    def _computed_here(
        self, batch: LayerBatch, layer: int, functions: Sequence[FunctionEntry]
    ) -> Collection[int]:
        """Return the positions that this process computes as it takes less time."""
        if self._hot is None:
            return ()
        if layer == 0:
            self._hot.begin_pass(self.routing, batch.n_rows)
        return self._hot.here(layer, batch.groups, functions)

    def _compute_here(
        self,
        batch: LayerBatch,
        here: Collection[int],
        entries: Mapping[int, FunctionEntry],
        in_flight: InFlight,
    ) -> list[int]:
        """Compute these positions; return those that must be called after all."""
        refused = []
        for i in here:
            assert self._hot is not None
            try:
                batch.compute(i, self._hot, entries[i].spec)
            except StoreCorrupted:  # here; a sandbox may have the right bytes
                refused.append(i)
                continue
            self._metrics.here.inc()
            in_flight.end(i)
        return refused

    def _try(
        self,
        batch: LayerBatch,
        entries: Mapping[int, FunctionEntry],
        in_flight: InFlight,
        turn: int,
        by_s: float,
        meanwhile: Meanwhile | None = None,
    ) -> Failures:
        """Call the functions of these positions; return the positions that got no part."""

        def take(position: int, frame: memoryview) -> None:
            batch.take(position, frame)
            self._metrics.received_bytes.inc(len(frame))
            in_flight.end(position)

        attempts = Attempts(
            entries,
            lambda position: len(batch.groups[position].rows),
            book=self._book,
            metrics=self._metrics,
            log=self._failures,
            turn=turn,
        )
        firsts = {i: attempts.first(i, batch.frame) for i in entries}
        calls = {i: call for i, call in firsts.items() if call is not None}
        self._book.extra.earn(len(calls))
        errors = self._fanout.run(calls, take, meanwhile=meanwhile, course=attempts, by_s=by_s)
        self._metrics.calls.inc(attempts.n_calls)
        self._metrics.sent_bytes.inc(attempts.sent_bytes)
        for i in calls.keys() - errors.keys():
            self._patience.found(entries[i].spec.id)
        return {i: attempts.errors.get(i) for i in entries if i not in calls or i in errors}

    def _hold(
        self,
        batch: LayerBatch,
        entries: Mapping[int, FunctionEntry],
        failures: Failures,
        holding: Holding,
        in_flight: InFlight,
        by_s: float,
    ) -> Collection[int]:
        """Wait for functions that are being started; return the positions that got no part."""
        left: list[int] = []
        tried = {i: entries[i] for i in failures}
        while True:
            self._moved.clear()
            routing, now_s = self.routing, time.monotonic()
            self._ask(routing, [tried[i].spec.id for i in failures], batch.n_rows, now_s)
            if now_s >= by_s:
                return [*left, *failures]
            waits_s = {
                i: self._wait_s(routing.entries.get(tried[i].spec.id), tried[i], error, now_s)
                for i, error in failures.items()
            }
            left += [i for i in failures if waits_s[i] is None]
            held = {i: wait_s for i, wait_s in waits_s.items() if wait_s is not None}
            if not held:
                return left
            with self._counted_as_held(len(held)):
                self._moved.wait(min(*held.values(), holding.probe_s))
            known = self.routing.entries
            again = {i: known.get(tried[i].spec.id, tried[i]) for i in held}
            failures = self._try(batch, again, in_flight, 0, by_s)
            tried |= again

    def _ask(
        self, routing: Routing, function_ids: Iterable[str], n_rows: int, now_s: float
    ) -> None:
        """Ask for the missed functions, and for those that the next layers will miss."""
        missed = dict.fromkeys((*function_ids, *routing.missing_for(n_rows)))
        due = self._patience.miss([name for name in missed if name in routing.entries], now_s)
        away = [name for name in due if not routing.entries[name].addresses]
        if away and self._holding is not None:
            self._holding.wake(away)

    def _wait_s(
        self,
        entry: FunctionEntry | None,
        tried: FunctionEntry,
        error: CallError | None,
        now_s: float,
    ) -> float | None:
        """Return how long a call may wait before it is tried again, None if it had better not."""
        left_s = self._patience.left_s(tried.spec.id, now_s)
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
        assert self._holding is not None
        ejected_s = [s for a in entry.addresses if (s := self._book.ejected_s(a)) is not None]
        left_s = max(ejected_s, default=0.0) + self._holding.replacement_s - now_s
        return left_s if left_s > 0 else None

    @contextmanager
    def _counted_as_held(self, n_calls: int) -> Iterator[None]:
        self.load.held = n_calls
        self._metrics.held.set(n_calls)
        try:
            yield
        finally:
            self.load.held = 0
            self._metrics.held.set(0)

    def close(self) -> None:
        """End what runs beside the engine's thread."""
        self._book.close()
        if self._hot is not None:
            self._hot.close()

    def _forget_what_left(self) -> None:
        routing = self.routing
        if routing is not self._seen:
            addresses = routing.addresses()
            self._book.keep(addresses)
            self._failures.keep(addresses)
            self._patience.keep(routing.entries)
            self._seen = routing


class _Once:
    """Work that is done the first time it is asked for."""

    def __init__(self, work: Meanwhile) -> None:
        self._work: Meanwhile | None = work

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()
