"""The calls of one batch at one layer: where each goes, and what else is tried for it."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from faasmoe_expert.table import FunctionEntry
from faasmoe_expert.wire.checksum import Buffer
from faasmoe_router.dispatch.calls import Call
from faasmoe_router.dispatch.choice import choose
from faasmoe_router.dispatch.errors import CallError, Ejected, NotYetThere, Overtaken
from faasmoe_router.dispatch.failures import FailureLog
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import AddressBook


class Attempts:
    """Chooses addresses; the `Course` of one round.

    Args:
        entries: the function of each position, with its addresses.
        n_rows: rows that each position carries.
        book: what is known of addresses.
        metrics: counters.
        log: where failures are told.
        turn: goes up by one with each batch of the layer.

    Attributes:
        errors: what each failed position failed with last.
        n_calls: calls made.
        sent_bytes: bytes of their frames.
    """

    def __init__(
        self,
        entries: Mapping[int, FunctionEntry],
        n_rows: Callable[[int], int],
        *,
        book: AddressBook,
        metrics: DispatchMetrics,
        log: FailureLog,
        turn: int,
    ) -> None:
        self.errors: dict[int, CallError] = {}
        self.n_calls = 0
        self.sent_bytes = 0
        self._entries = entries
        self._n_rows = n_rows
        self._book = book
        self._metrics = metrics
        self._log = log
        self._turn = turn
        self._busy: Counter[str] = Counter()
        self._tried: defaultdict[int, list[str]] = defaultdict(list)

    def first(self, position: int, frame: Callable[[int], Sequence[Buffer]]) -> Call | None:
        """Return a position's first call, None if there is no address to make it at."""
        entry = self._entries[position]
        address = self._choose(position)
        if address is None:
            if entry.addresses:
                self.errors[position] = Ejected(f"{entry.spec.id}: every address is ejected")
            return None
        return self._made(position, Call(address, entry.spec.id, frame(position)))

    def patience_s(self, position: int, call: Call) -> tuple[float, float]:
        """Return after how many seconds a call is hedged, and after how many it is too slow."""
        return self._book.patience_s(self._n_rows(position))

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return the same call for another replica, if there is one and the bound allows it."""
        address = self._choose(position)
        if address is None or not self._book.extra.spend():
            return None
        self._metrics.hedges.inc()
        return self._made(position, call.at(address))

    def is_too_slow(self, position: int, call: Call) -> bool:
        """Return whether to give up a call that takes many times as long as others."""
        return self._book.extra.spend()

    def another(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return the same call for a replica that was not tried yet."""
        if len(self._tried[position]) >= self._book.settings.max_attempts:
            return None
        address = self._choose(position)
        if address is None:
            return None
        self._metrics.retries.inc()
        return self._made(position, call.at(address))

    def answered(self, position: int, call: Call, took_s: float) -> None:
        """Take note of a good answer."""
        self._busy[call.address] -= 1
        self._book.answered(call.address, n_rows=self._n_rows(position), took_s=took_s)

    def failed(self, position: int, call: Call, error: CallError) -> None:
        """Take note of a call that failed, or that was overtaken."""
        now_s = time.monotonic()
        self._busy[call.address] -= 1
        known = self._book.failed(call.address, error, now_s)
        if isinstance(known, Overtaken):
            return
        self._metrics.failed_calls.inc()
        self.errors[position] = known
        if not isinstance(known, NotYetThere):
            self._log.note(call.address, known, now_s)

    def _choose(self, position: int) -> str | None:
        addresses = self._entries[position].addresses
        tried, ejected = self._tried[position], self._book.avoided(addresses)
        if len(addresses) == 1:
            only = addresses[0]
            return None if only in tried or only in ejected else only
        return choose(
            addresses,
            avoid=ejected,
            tried=tried,
            busy=self._busy,
            turn=self._turn,
            chance=random.random(),
        )

    def _made(self, position: int, call: Call) -> Call:
        self._tried[position].append(call.address)
        self._busy[call.address] += 1
        self.n_calls += 1
        self.sent_bytes += call.size_bytes
        return call
