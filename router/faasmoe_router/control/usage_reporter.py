"""Telling the control plane what tenants have used, and hearing what they have over all routers.

Totals are told, again and again: a telling that is lost is made good by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from faasmoe_router.errors import ControlError, ControlProtocolError

logger = logging.getLogger(__name__)

USAGE_REPORT_INTERVAL_S = 5.0
UNCHANGED_REPORT_INTERVAL_S = 60.0  # while nothing is new and there is no other router to hear of

INVALID_TOTALS_ERRORS = (KeyError, TypeError, ValueError, AttributeError)
UsageTotals = Mapping[str, Mapping[str, float]]


class UsageReportSink(Protocol):
    """Who is told; `ControlClient` is one."""

    async def report_usage(self, body: dict[str, Any]) -> Any:
        """Tell a book's totals; return those of all books; raises ControlError."""


class UsageSource(Protocol):
    """This router's book; `Tenancy.books` is one."""

    @property
    def ledger_id(self) -> str:
        """The book's name, which no other router's has."""

    @property
    def since_s(self) -> float:
        """When it was opened, seconds since the epoch."""

    async def persisted_totals(self) -> UsageTotals:
        """Return each tenant's totals."""

    def apply_cluster_totals(
        self, totals: UsageTotals, *, reported: UsageTotals, since_s: float, now_s: float
    ) -> None:
        """Take each tenant's totals over all routers."""


class UsageReporter:
    """Tells one router's book.

    Args:
        client: who is told.
        books: the book.
        n_routers: tells how many routers there are.
        interval_s: time between two tellings.
    """

    def __init__(
        self,
        client: UsageReportSink,
        source: UsageSource,
        *,
        n_routers: Callable[[], int],
        interval_s: float = USAGE_REPORT_INTERVAL_S,
    ) -> None:
        self._client = client
        self._source = source
        self._n_routers = n_routers
        self._interval_s = interval_s
        self._reported: UsageTotals | None = None
        self._reported_s = 0.0
        self._is_failing = False

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(self._interval_s)

    async def report_final(self) -> None:
        """Tell a last time."""
        await self.report(is_final=True)

    async def report(self, *, is_final: bool = False) -> None:
        """Tell the totals as they are now; failing is logged.

        Args:
            ends: whether this router ends.
        """
        totals = await self._source.persisted_totals()
        if not is_final and self._is_unchanged(totals):
            return
        try:
            await self._send(totals, is_final=is_final)
        except ControlError as error:
            if not self._is_failing:
                logger.warning("A usage report failed: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False
            self._reported, self._reported_s = totals, time.monotonic()

    def _is_unchanged(self, totals: UsageTotals) -> bool:
        """Return whether telling would be no news, to either side."""
        is_recent = time.monotonic() - self._reported_s < UNCHANGED_REPORT_INTERVAL_S
        return totals == self._reported and is_recent and self._n_routers() == 1

    async def _send(self, reported: UsageTotals, *, is_final: bool) -> None:
        ledger = {"book": self._source.ledger_id, "since_s": self._source.since_s}
        response = await self._client.report_usage(
            {**ledger, "ends": is_final, "tenants": reported}
        )
        try:
            since_s, totals = parse_totals(response)
        except INVALID_TOTALS_ERRORS as error:
            raise ControlProtocolError(f"usage: {error!r}") from error
        self._source.apply_cluster_totals(
            totals, reported=reported, since_s=since_s, now_s=time.time()
        )


def parse_totals(response: Any) -> tuple[float, dict[str, dict[str, float]]]:
    """Read what was used over all routers, and since when; raises DAMAGED."""
    tenants = {
        str(name): {str(field): _parse_number(number) for field, number in numbers.items()}
        for name, numbers in response["tenants"].items()
    }
    return _parse_number(response["since_s"]), tenants


def _parse_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"got {value!r}, expected numbers of 0 or more")
    return value
