"""Reports tenants' usage to the control plane and applies the totals over all routers.

Reports carry totals, not increments, so a lost report is made good by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from faasmoe_contracts.usage import ClusterTotals, UsageRecord, UsageReport
from faasmoe_router.errors import ControlError

logger = logging.getLogger(__name__)

USAGE_REPORT_INTERVAL_S = 5.0
UNCHANGED_REPORT_INTERVAL_S = 60.0  # without new usage, in a cluster of one router


class UsageReportSink(Protocol):
    """Receiver of usage reports, such as `ControlClient`."""

    async def report_usage(self, report: UsageReport) -> ClusterTotals:
        """Report this router's totals and return those of all routers; raises ControlError."""


class UsageSource(Protocol):
    """This router's usage, such as `ClusterUsage`."""

    @property
    def source_id(self) -> str:
        """Identity of the router's counters, unique over all routers."""

    @property
    def since_s(self) -> float:
        """Start of counting, seconds since the epoch."""

    async def persisted_totals(self) -> Mapping[str, UsageRecord]:
        """Return the router's totals by tenant, after they were saved."""

    def apply_cluster_totals(
        self, totals: ClusterTotals, *, reported: Mapping[str, UsageRecord], now_s: float
    ) -> None:
        """Replace the usage through other routers."""


class UsageReporter:
    """Reports one router's usage periodically.

    Args:
        client: receiver of the reports.
        source: the router's usage.
        n_routers: returns the number of routers.
        interval_s: time between two reports, in seconds.
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
        self._reported: Mapping[str, UsageRecord] | None = None
        self._reported_s = 0.0
        self._is_failing = False

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(self._interval_s)

    async def report_final(self) -> None:
        """Send the last report before the router shuts down."""
        await self.report(is_final=True)

    async def report(self, *, is_final: bool = False) -> None:
        """Report the current totals; a failure is logged once until a report succeeds.

        Args:
            is_final: whether the router shuts down afterwards.
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

    def _is_unchanged(self, totals: Mapping[str, UsageRecord]) -> bool:
        """Return whether a report would bring news neither to the control plane nor back."""
        is_recent = time.monotonic() - self._reported_s < UNCHANGED_REPORT_INTERVAL_S
        return totals == self._reported and is_recent and self._n_routers() == 1

    async def _send(self, reported: Mapping[str, UsageRecord], *, is_final: bool) -> None:
        report = UsageReport(self._source.source_id, self._source.since_s, reported, is_final)
        totals = await self._client.report_usage(report)
        self._source.apply_cluster_totals(totals, reported=reported, now_s=time.time())
