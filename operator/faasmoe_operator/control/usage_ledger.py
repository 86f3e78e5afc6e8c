"""The usage ledger: what each tenant has used over all routers, and its persistence.

Routers report the totals of their own counters repeatedly. The ledger adds the increase since the
last report of the same source, so repeated reports count once, and a lost report is contained in
the next one. A `UsageStore` keeps the ledger over restarts of the control process, and
`UsageLedgerWriter` decides when to write it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from math import ceil
from typing import Any, Protocol

from faasmoe_contracts.json_reader import require_finite
from faasmoe_contracts.usage import (
    MAX_TENANTS_IN_LEDGER,
    USAGE_FIELDS,
    ClusterTotals,
    UsageRecord,
    UsageReport,
)
from faasmoe_operator.aio import ChangeNotifier

logger = logging.getLogger(__name__)

MAX_USAGE_SOURCES = 256
LEDGER_FORMAT_VERSION = 1
LEDGER_DECODE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `decode_ledger` raises for an invalid text."""
RETRY_S = 5.0
FINAL_WRITE_TIMEOUT_S = 2.0


class UsageLedger:
    """Usage of all tenants, and the last totals of each router.

    Args:
        since_s: start of counting, seconds since the epoch.
        usage_by_tenant: usage so far.
        last_reported: last totals by source and tenant.

    Attributes:
        since_s: start of counting of the oldest source, seconds since the epoch.
        usage_by_tenant: usage over all routers.
        last_reported: last totals by source and tenant; the most recent source is the last one.
        n_updates: reports that contained new usage.
        n_final_reports: reports of routers that shut down.
    """

    def __init__(
        self,
        since_s: float,
        *,
        usage_by_tenant: Mapping[str, UsageRecord] | None = None,
        last_reported: Mapping[str, Mapping[str, UsageRecord]] | None = None,
    ) -> None:
        self.since_s = since_s
        self.usage_by_tenant = dict(usage_by_tenant or {})
        self.last_reported: dict[str, Mapping[str, UsageRecord]] = dict(last_reported or {})
        self.n_updates = 0
        self.n_final_reports = 0

    def has_capacity_for(self, tenants: Iterable[str]) -> bool:
        """Return whether the ledger may contain these tenants in addition."""
        return len(self.usage_by_tenant.keys() | set(tenants)) <= MAX_TENANTS_IN_LEDGER

    def add_report(self, report: UsageReport) -> None:
        """Add the increase of each total since the last report of the same source."""
        previous = self.last_reported.pop(report.source_id, {})
        increases = {
            name: totals.minus(previous.get(name, UsageRecord()))
            for name, totals in report.tenants.items()
        }
        for name, increase in increases.items():
            self.usage_by_tenant[name] = self.usage_by_tenant.get(name, UsageRecord()) + increase
        highest = {
            name: totals.maximum(previous.get(name, UsageRecord()))
            for name, totals in report.tenants.items()
        }
        self.last_reported[report.source_id] = {**previous, **highest}
        self.since_s = min(self.since_s, report.since_s)
        self.n_updates += any(increase != UsageRecord() for increase in increases.values())
        self.n_final_reports += report.is_final
        while len(self.last_reported) > MAX_USAGE_SOURCES:
            del self.last_reported[next(iter(self.last_reported))]

    def cluster_totals(self) -> ClusterTotals:
        """Return the usage over all routers."""
        return ClusterTotals(self.since_s, dict(self.usage_by_tenant))


class UsageStore(Protocol):
    """Keeps the ledger of one model: a file or a ConfigMap."""

    def read(self) -> UsageLedger:
        """Return the saved ledger; a new one if there is none or it is corrupted."""

    async def write(self, ledger: UsageLedger) -> bool:
        """Replace the saved ledger; return whether that succeeded. Failures are logged."""


class UsageLedgerWriter:
    """Writes a ledger some time after it has changed, and immediately when a router shuts down.

    A running router reports its totals again, whatever is lost here; one that has shut down does
    not.

    Args:
        ledger: the ledger.
        change_notifier: notified whenever the ledger may have changed.
        store: where the ledger is kept.
        interval_s: delay from a change to its write, in seconds.
    """

    def __init__(
        self,
        ledger: UsageLedger,
        change_notifier: ChangeNotifier,
        store: UsageStore,
        *,
        interval_s: float,
    ) -> None:
        self._ledger = ledger
        self._change_notifier = change_notifier
        self._store = store
        self._interval_s = interval_s
        self._n_written_updates = ledger.n_updates
        self._n_written_final_reports = ledger.n_final_reports

    async def run(self) -> None:
        """Write changes until cancelled, and then once more."""
        try:
            while True:
                await self._change_notifier.wait_for(self._has_changes)
                await self._wait_for_final_report()
                if not await self._write_changes():
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._write_final()

    async def _wait_for_final_report(self) -> None:
        """Wait for the write interval, or less if a router shuts down."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._change_notifier.wait_for(
                    lambda: self._ledger.n_final_reports != self._n_written_final_reports
                )
        except TimeoutError:
            return

    async def _write_final(self) -> None:
        if not self._has_changes():
            return
        try:
            async with asyncio.timeout(FINAL_WRITE_TIMEOUT_S):
                await self._write_changes()
        except TimeoutError:
            logger.warning("tenant usage was not saved in time")

    async def _write_changes(self) -> bool:
        counts = self._ledger.n_updates, self._ledger.n_final_reports
        is_written = await self._store.write(self._ledger)
        if is_written:
            self._n_written_updates, self._n_written_final_reports = counts
        return is_written

    def _has_changes(self) -> bool:
        return self._ledger.n_updates != self._n_written_updates


def encode_ledger(ledger: UsageLedger, *, max_chars: int) -> str:
    """Return a ledger as JSON text, each record an array of the values of USAGE_FIELDS.

    Args:
        ledger: the ledger.
        max_chars: length above which the sources that reported least recently are omitted.
    """
    n_omitted = 0
    while len(text := _dump_ledger(ledger, n_omitted)) > max_chars and n_omitted < len(
        ledger.last_reported
    ):
        n_omitted = max(
            n_omitted + 1, ceil(len(ledger.last_reported) * (1 - max_chars / len(text)))
        )
    return text


def decode_ledger(text: str) -> UsageLedger:
    """Read the JSON text of a ledger; raises LEDGER_DECODE_ERRORS."""
    value = json.loads(text)
    if (value["version"], tuple(value["fields"])) != (LEDGER_FORMAT_VERSION, USAGE_FIELDS):
        raise ValueError(f"version: got {value['version']!r}, expected {LEDGER_FORMAT_VERSION}")
    last_reported = {str(name): _parse_records(rows) for name, rows in value["books"].items()}
    return UsageLedger(
        require_finite(value["since_s"], field="since_s"),
        usage_by_tenant=_parse_records(value["accounts"]),
        last_reported=last_reported,
    )


def _dump_ledger(ledger: UsageLedger, n_omitted: int) -> str:
    sources = islice(ledger.last_reported.items(), n_omitted, None)
    value = {
        "version": LEDGER_FORMAT_VERSION,
        "since_s": ledger.since_s,
        "fields": USAGE_FIELDS,
        "accounts": _dump_records(ledger.usage_by_tenant),
        "books": {source_id: _dump_records(totals) for source_id, totals in sources},
    }
    return json.dumps(value, separators=(",", ":"))


def _dump_records(records: Mapping[str, UsageRecord]) -> dict[str, tuple[float, ...]]:
    return {name: record.values for name, record in records.items()}


def _parse_records(rows: Any) -> dict[str, UsageRecord]:
    return {str(name): _parse_record(row) for name, row in rows.items()}


def _parse_record(row: Any) -> UsageRecord:
    if not isinstance(row, list) or len(row) != len(USAGE_FIELDS):
        raise TypeError(f"accounts: got {row!r}, expected {len(USAGE_FIELDS)} numbers")
    values: list[Any] = [require_finite(number, field="accounts") for number in row]
    return UsageRecord(*values)
