"""What each tenant has used over all routers, from the books that the routers keep. Pure.

A router tells the totals of its own book, again and again; what is more in them than when they were
told last is added to the tenants' accounts. What is told twice counts once, and what was told and
lost is in the totals that are told next. Tokens and sums only: nothing of which experts were used.

The ledger as text, by which it outlives a control core: JSON, each account a row. Pure.

Writing the ledger down: some seconds after it has changed, and at once when a router ends.

A router that goes on tells its totals again, whatever was lost here; one that ends does not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from faasmoe_operator.platforms.registry import ChangeNotifier

logger = logging.getLogger(__name__)


MAX_TENANTS_IN_LEDGER = 1024
MAX_USAGE_SOURCES = 256


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What one tenant has used.

    Attributes:
        prompt_tokens: tokens of prompts.
        generated_tokens: tokens generated.
        completed: requests that ended well.
        cancelled: requests that their clients gave up.
        failed: requests that could not be finished.
        limited: requests that were refused for want of allowance or of room.
        expert_seconds: the tenant's part of the time that functions were in use.
        expert_gb_seconds: the same, times the functions' sizes.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    limited: int = 0
    expert_seconds: float = 0.0
    expert_gb_seconds: float = 0.0

    def __add__(self, other: TenantUsage) -> TenantUsage:
        """Return both together."""
        return self._combine(other, lambda mine, others: mine + others)

    @property
    def values(self) -> tuple[Any, ...]:
        """The fields, in their order."""
        return tuple(getattr(self, name) for name in USAGE_FIELDS)

    def increase_since(self, before: TenantUsage) -> TenantUsage:
        """Return what is more here than before; a field that has shrunk is no more."""
        return self._combine(before, lambda now, then: max(now - then, 0))

    def elementwise_max(self, before: TenantUsage) -> TenantUsage:
        """Return the larger of each field."""
        return self._combine(before, max)

    def _combine(self, other: TenantUsage, combine: Callable[[Any, Any], Any]) -> TenantUsage:
        return TenantUsage(*map(combine, self.values, other.values))


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What a router says of its book.

    Attributes:
        book: the book's name, which no other book has.
        since_s: when it was opened, seconds since the epoch.
        tenants: its totals.
        ends: whether the router ends.
    """

    source: str
    since_s: float
    tenants: Mapping[str, TenantUsage]
    is_final: bool = False


USAGE_FIELDS = tuple(field.name for field in fields(TenantUsage))


class UsageLedger:
    """The tenants' accounts, and what each router's book said last.

    Attributes:
        since_s: when the first of the books was opened, seconds since the epoch.
        accounts: what each tenant has used.
        books: what each book said of each tenant, the one that was told last at the end.
        n_tellings: how often something new was told.
        n_endings: how often a router told that it ends.
    """

    def __init__(
        self,
        since_s: float,
        *,
        usage_by_tenant: Mapping[str, TenantUsage] | None = None,
        last_reported: Mapping[str, Mapping[str, TenantUsage]] | None = None,
    ) -> None:
        self.since_s = since_s
        self.usage_by_tenant = dict(usage_by_tenant or {})
        self.last_reported: dict[str, Mapping[str, TenantUsage]] = dict(last_reported or {})
        self.n_updates = 0
        self.n_final_reports = 0

    def has_capacity_for(self, tenants: Iterable[str]) -> bool:
        """Return whether there may be accounts for these tenants too."""
        return len(self.usage_by_tenant.keys() | set(tenants)) <= MAX_TENANTS_IN_LEDGER

    def add_report(self, report: UsageReport) -> None:
        """Take what a book says."""
        previous = self.last_reported.pop(report.source, {})
        increases = {
            name: use.increase_since(previous.get(name, TenantUsage()))
            for name, use in report.tenants.items()
        }
        for name, use in increases.items():
            self.usage_by_tenant[name] = self.usage_by_tenant.get(name, TenantUsage()) + use
        highest = {
            name: use.elementwise_max(previous.get(name, TenantUsage()))
            for name, use in report.tenants.items()
        }
        self.last_reported[report.source] = {**previous, **highest}
        self.since_s = min(self.since_s, report.since_s)
        self.n_updates += any(use != TenantUsage() for use in increases.values())
        self.n_final_reports += report.is_final
        while len(self.last_reported) > MAX_USAGE_SOURCES:
            del self.last_reported[next(iter(self.last_reported))]


LEDGER_FORMAT_VERSION = 1
LEDGER_DECODE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `decode` raises for a text that is no ledger."""


def encode_ledger(ledger: UsageLedger, *, max_chars: int) -> str:
    """Return a ledger as text.

    Args:
        ledger: the ledger.
        max_chars: of books beyond this, those that were told longest ago are left out.
    """
    n_omitted = 0
    while len(text := _dump_ledger(ledger, n_omitted)) > max_chars and n_omitted < len(
        ledger.last_reported
    ):
        n_omitted = max(
            n_omitted + 1, math.ceil(len(ledger.last_reported) * (1 - max_chars / len(text)))
        )
    return text


def decode_ledger(text: str) -> UsageLedger:
    """Return a ledger; raises DAMAGED."""
    value = json.loads(text)
    if (value["version"], tuple(value["fields"])) != (LEDGER_FORMAT_VERSION, USAGE_FIELDS):
        raise ValueError(f"version: got {value['version']!r}, expected {LEDGER_FORMAT_VERSION}")
    last_reported = {str(name): _parse_usage_rows(told) for name, told in value["books"].items()}
    since_s = _parse_number(value["since_s"])
    return UsageLedger(
        since_s, usage_by_tenant=_parse_usage_rows(value["accounts"]), last_reported=last_reported
    )


def _dump_ledger(ledger: UsageLedger, n_omitted: int) -> str:
    books = islice(ledger.last_reported.items(), n_omitted, None)
    value = {
        "version": LEDGER_FORMAT_VERSION,
        "since_s": ledger.since_s,
        "fields": USAGE_FIELDS,
        "accounts": _usage_rows(ledger.usage_by_tenant),
        "books": {name: _usage_rows(told) for name, told in books},
    }
    return json.dumps(value, separators=(",", ":"))


def _usage_rows(usage_by_key: Mapping[str, TenantUsage]) -> dict[str, tuple[float, ...]]:
    return {name: use.values for name, use in usage_by_key.items()}


def _parse_usage_rows(rows: Any) -> dict[str, TenantUsage]:
    return {str(name): _parse_usage_row(row) for name, row in rows.items()}


def _parse_usage_row(row: Any) -> TenantUsage:
    if not isinstance(row, list) or len(row) != len(USAGE_FIELDS):
        raise TypeError(f"accounts: got {row!r}, expected {len(USAGE_FIELDS)} numbers")
    return TenantUsage(
        **{name: _parse_number(number) for name, number in zip(USAGE_FIELDS, row, strict=True)}
    )


def _parse_number(value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"accounts: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"accounts: got {value!r}, expected numbers of 0 or more")
    return value


RETRY_S = 5.0
FINAL_WRITE_TIMEOUT_S = 2.0


class UsageLedgerWriter:
    """Writes one ledger until cancelled, and then a last time.

    Args:
        ledger: the ledger.
        changed: tells when it may have changed.
        write: writes it whole; returns whether that went well.
        interval_s: time from a change to its being written.
    """

    def __init__(
        self,
        ledger: UsageLedger,
        change_notifier: ChangeNotifier,
        write: Callable[[UsageLedger], Awaitable[bool]],
        *,
        interval_s: float,
    ) -> None:
        self._ledger = ledger
        self._change_notifier = change_notifier
        self._write = write
        self._interval_s = interval_s
        self._n_written_updates = ledger.n_updates
        self._n_written_final_reports = ledger.n_final_reports

    async def run(self) -> None:
        """Write what is new."""
        try:
            while True:
                await self._change_notifier.wait_for(self._has_changes)
                await self._wait_for_final_report()
                if not await self._write_changes():
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._write_final()

    async def _wait_for_final_report(self) -> None:
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
        is_written = await self._write(self._ledger)
        if is_written:
            self._n_written_updates, self._n_written_final_reports = counts
        return is_written

    def _has_changes(self) -> bool:
        return self._ledger.n_updates != self._n_written_updates
