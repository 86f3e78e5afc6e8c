"""Which addresses are ejected: they get no calls until a probe finds them well. Pure.

An address that refuses connections is ejected at once, one that answers wrongly or not in time
after some such calls in a row. It is probed after a while that doubles with each probe that fails.
Slow addresses are ejected only as long as half of all stay: when all are slow, it is not they.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What was wrong with a call."""

    GONE = "nothing listens at the address"
    WRONG = "the connection broke, or the answer was none"
    SLOW = "it took too long"
    OVERTAKEN = "another replica, asked later, was faster"


@dataclass(frozen=True, slots=True)
class Ejection:
    """When addresses are ejected, and for how long.

    Attributes:
        wrong_in_a_row: wrong answers in a row after which an address is ejected.
        slow_in_a_row: the same for calls that took too long.
        overtaken_in_a_row: the same for calls that a hedge was faster than, which happens to one
            call in twenty though nothing is wrong.
        first_s: how long after its ejection an address is probed.
        most_s: the most between two probes.
        forgive_s: how long an address must be well for its next ejection to be a first one.
    """

    wrong_in_a_row: int = 3
    slow_in_a_row: int = 2
    overtaken_in_a_row: int = 4
    first_s: float = 0.5
    most_s: float = 30.0
    forgive_s: float = 60.0


@dataclass(slots=True)
class _Record:
    n_wrong: int = 0
    n_slow: int = 0
    n_overtaken: int = 0
    n_ejections: int = 0
    ejected_s: float | None = None
    returned_s: float = 0.0
    probe_s: float = 0.0
    is_probed: bool = False


class Outliers:
    """The addresses that had faults lately.

    Attributes:
        ejected: those that get no calls now.
        n_ejections: how often one was ejected so far.
    """

    def __init__(self, settings: Ejection | None = None) -> None:
        self._settings = settings or Ejection()
        self._records: dict[str, _Record] = {}
        self._ejected: set[str] = set()
        self._slow: set[str] = set()
        self._n_known = 0
        self.n_ejections = 0

    @property
    def ejected(self) -> Set[str]:
        """Addresses that get no calls now."""
        return self._ejected

    @property
    def slow(self) -> Set[str]:
        """Those of the ejected that were only ever overtaken: better than nobody."""
        return self._slow

    def ejected_s(self, address: str) -> float | None:
        """Return when an address was ejected, None if it is not."""
        record = self._records.get(address)
        return None if record is None else record.ejected_s

    def succeeded(self, address: str) -> None:
        """Take note of a good answer."""
        record = self._records.get(address)
        if record is not None:
            record.n_wrong = record.n_slow = record.n_overtaken = 0

    def failed(self, address: str, fault: Fault, now_s: float) -> None:
        """Take note of a fault; it may eject the address."""
        record = self._records.setdefault(address, _Record())
        record.n_wrong += fault is Fault.WRONG
        record.n_slow += fault is Fault.SLOW
        record.n_overtaken += fault is Fault.OVERTAKEN
        if fault is not Fault.OVERTAKEN:
            self._slow.discard(address)
        if record.ejected_s is None and self._is_enough(record, fault):
            self._eject(address, record, now_s)
            if fault is Fault.OVERTAKEN:
                self._slow.add(address)

    def due(self, now_s: float) -> list[str]:
        """Return the ejected addresses to probe now; each is told once until `probed`."""
        due = [a for a in self._ejected if self._is_due(self._records[a], now_s)]
        for address in due:
            self._records[address].is_probed = True
        return due

    def probed(self, address: str, *, is_well: bool, now_s: float) -> None:
        """Take the outcome of a probe: let the address return, or wait for longer."""
        record = self._records.get(address)
        if record is None or record.ejected_s is None:
            return
        record.is_probed = False
        if not is_well:
            record.probe_s = now_s + self._wait_s(record)
            record.n_ejections += 1
            return
        record.ejected_s = None
        record.returned_s = now_s
        record.n_wrong = record.n_slow = record.n_overtaken = 0
        self._return(address)

    def keep(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        self._n_known = len(addresses)
        for address in self._records.keys() - addresses:
            del self._records[address]
            self._return(address)

    def _return(self, address: str) -> None:
        self._ejected.discard(address)
        self._slow.discard(address)

    def _is_enough(self, record: _Record, fault: Fault) -> bool:
        if fault is Fault.GONE:
            return True
        if record.n_wrong >= self._settings.wrong_in_a_row:
            return True
        settings = self._settings
        is_slow = (
            record.n_slow >= settings.slow_in_a_row
            or record.n_overtaken >= settings.overtaken_in_a_row
        )
        return is_slow and len(self._ejected) < max(1, self._n_known // 2)

    def _eject(self, address: str, record: _Record, now_s: float) -> None:
        if now_s - record.returned_s >= self._settings.forgive_s:
            record.n_ejections = 0
        record.ejected_s = now_s
        record.probe_s = now_s + self._wait_s(record)
        record.n_ejections += 1
        record.is_probed = False
        self._ejected.add(address)
        self.n_ejections += 1

    def _wait_s(self, record: _Record) -> float:
        doubled = self._settings.first_s * 2 ** min(record.n_ejections, 16)
        return float(min(self._settings.most_s, doubled))

    def _is_due(self, record: _Record, now_s: float) -> bool:
        return not record.is_probed and now_s >= record.probe_s
