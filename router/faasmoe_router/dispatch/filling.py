"""Getting a layer's parts: from functions, from functions that are awaited, or computed here.

Nothing that a sandbox or the network does leaves this module as an error. A call that fails is made
again at the function's other addresses (attempts.py). A function without an address is asked for
and its calls are held for a moment; so are calls to an address that does not accept connections
yet, and, for a shorter one, calls whose addresses were ejected, for a fresh replica to come. What
is left then is computed from the store. Hot functions may be computed here to begin with (hot.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry
from faasmoe_router.dispatch.attempts import Attempts
from faasmoe_router.dispatch.batch import LayerBatch
from faasmoe_router.dispatch.calls import Timeouts
from faasmoe_router.dispatch.failures import FailureLog
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.holding import Failures, Holder, Holding
from faasmoe_router.dispatch.hot import HotFunctions
from faasmoe_router.dispatch.in_flight import InFlight
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import AddressBook, Resilience
from faasmoe_router.dispatch.routing import Routing
from faasmoe_router.errors import StoreCorrupted

Meanwhile = Callable[[], None]


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
        self._local = LocalFunctions(store)
        self._hot = hot
        self._turns: dict[int, int] = defaultdict(int)  # by layer: spreads calls over replicas
        self._book = AddressBook(resilience or Resilience(), metrics, may_start=holding is not None)
        self._holder: Holder | None = None
        if holding is not None:
            self._holder = Holder(holding, book=self._book, load=self.load, metrics=metrics)
        self._layer_timeout_s = (timeouts or Timeouts()).layer_timeout_s
        self._failures = FailureLog()
        self._seen = routing

    def take_routing(self, routing: Routing) -> None:
        """Let the calls from now on go elsewhere, those that are held too; from any thread."""
        self.routing = routing
        self._fanout.retain(routing.addresses())
        if self._hot is not None:
            self._hot.let_go(routing)
        if self._holder is not None:
            self._holder.moved.set()

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
            for i in self._hold(batch, entries, failures, in_flight, by_s):
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
        if self._holder is not None:
            for i in calls.keys() - errors.keys():
                self._holder.patience.found(entries[i].spec.id)
        return {i: attempts.errors.get(i) for i in entries if i not in calls or i in errors}

    def _hold(
        self,
        batch: LayerBatch,
        entries: Mapping[int, FunctionEntry],
        failures: Failures,
        in_flight: InFlight,
        by_s: float,
    ) -> Collection[int]:
        """Have what failed wait, if anything may; return the positions that got no part."""
        if not failures or self._holder is None:
            return failures.keys()
        return self._holder.hold(
            entries,
            failures,
            n_rows=batch.n_rows,
            routing=lambda: self.routing,
            try_again=lambda again: self._try(batch, again, in_flight, 0, by_s),
            by_s=by_s,
        )

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
            if self._holder is not None:
                self._holder.patience.keep(routing.entries)
            self._seen = routing


class _Once:
    """Work that is done the first time it is asked for."""

    def __init__(self, work: Meanwhile) -> None:
        self._work: Meanwhile | None = work

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()
