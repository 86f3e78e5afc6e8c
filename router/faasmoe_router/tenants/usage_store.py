"""Persistence of this router's usage, and usage over all routers.

`UsageFileStore` keeps the router's own usage in a file, and what requests used since it was written
in a journal; a request that a killed router had counted, and that is repeated, counts no more.
`ClusterUsage` adds what was used through
the other routers: the control plane's totals over all routers, less what this router had reported
when it got them. So the sum stays valid while the control plane is unreachable, and lags only by
what other routers have not reported.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.atomic_file import quarantine, write_atomically
from faasmoe_contracts.usage import ClusterTotals, UsageRecord
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.usage import RouterUsage
from faasmoe_router.tenants.usage_journal import (
    RequestUsage,
    UsageJournal,
    read_from,
    remove_before,
)

logger = logging.getLogger(__name__)

FILE_NAME = "usage.json"
MAX_RECENT_REQUESTS = 1024  # whose responses may not have been sent to their end


class UsageFileStore:
    """Keeps the usage of one router in a folder that no other router uses.

    Args:
        folder: the folder; created if it does not exist.

    Raises:
        RouterConfigError: the folder is not writable.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RouterConfigError(f"FAASMOE_STATE_DIR: {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RouterConfigError(f"FAASMOE_STATE_DIR: {folder}: not writable")
        self._path = folder / FILE_NAME
        self._last_content = ""
        self._journal = UsageJournal(folder, 0)
        self._recent = deque[str](maxlen=MAX_RECENT_REQUESTS)
        self._counted = frozenset[str]()  # by processes before this one

    def load(self) -> RouterUsage:
        """Return the saved usage, or a new one; a corrupted file is quarantined for inspection.

        Call it once, before anything is appended.
        """
        usage, first_journal = self._load_file()
        requests, next_journal = read_from(self._path.parent, first_journal)
        self._journal = UsageJournal(self._path.parent, next_journal)
        for request in requests:
            request.add_to(usage)
            self._recent.append(request.request_id)
        self._counted = frozenset(self._recent) - {""}
        return usage

    def is_counted(self, request_id: str) -> bool:
        """Return whether a process before this one has counted a request."""
        return request_id in self._counted

    def _load_file(self) -> tuple[RouterUsage, int]:
        """Return the usage in the file, and the number of the journal that continues it."""
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            usage, first_journal = RouterUsage.from_json(value), int(value.get("journal", 0))
            self._recent.extend(str(request_id) for request_id in value.get("recent", ()))
            return usage, first_journal
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.error("%s cannot be read and is moved aside: %s", self._path, error)
            quarantine(self._path)
        return RouterUsage(time.time()), 0

    def append(self, usage: RequestUsage) -> None:
        """Write the usage of one request to the journal; a failure is logged."""
        self._journal.append(usage)
        self._recent.append(usage.request_id)

    def describe(self, usage: RouterUsage) -> str:
        """Return the content of the file for `save`; what is appended later goes to a new journal.

        Args:
            usage: the usage, with every request that was appended.
        """
        recent = [request_id for request_id in self._recent if request_id]
        journal = self._journal.start_next()
        return json.dumps({**usage.to_json(), "journal": journal, "recent": recent})

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def save(self, content: str) -> None:
        """Write the file, unless its content is unchanged; a failure is logged.

        Args:
            content: from `describe`.
        """
        if content == self._last_content:
            return
        try:
            write_atomically(self._path, content, temp_path=self._path.with_suffix(".new"))
            self._last_content = content
            remove_before(self._path.parent, json.loads(content).get("journal", 0))
        except OSError as error:
            logger.error("Tenant usage cannot be saved: %s: %s", self._path, error.strerror)


@dataclass(frozen=True, slots=True)
class RemoteUsage:
    """Usage through the other routers.

    Attributes:
        tenants: usage by tenant.
        since_s: start of counting of the oldest router, seconds since the epoch.
        as_of_s: when the totals were received, seconds since the epoch; None if they never were.
    """

    tenants: Mapping[str, UsageRecord]
    since_s: float
    as_of_s: float | None = None


class ClusterUsage:
    """Usage through this router and, as far as reported, through the others.

    Used on the event loop only.

    Args:
        usage: usage through this router.
        store: where it is saved; None keeps it in memory only.

    Attributes:
        remote: usage through the other routers.
    """

    def __init__(self, usage: RouterUsage, store: UsageFileStore | None = None) -> None:
        self._usage = usage
        self._store = store
        self._save_lock = asyncio.Lock()
        self.remote = RemoteUsage({}, usage.since_s)

    @property
    def source_id(self) -> str:
        """Identity of this router's counters, unique over all routers."""
        return self._usage.source_id

    @property
    def since_s(self) -> float:
        """Start of counting in this router, seconds since the epoch."""
        return self._usage.since_s

    def record(self, usage: RequestUsage) -> None:
        """Count a request that has ended, once, in a way that survives this process."""
        if self._store is not None and self._store.is_counted(usage.request_id):
            return
        usage.add_to(self._usage)
        if self._store is not None:
            self._store.append(usage)

    async def close(self) -> None:
        """Save the usage, and write no more."""
        await self.save()
        if self._store is not None:
            self._store.close()

    async def save(self) -> None:
        """Save this router's usage."""
        if self._store is None:
            return
        async with self._save_lock:  # an older content must not replace a newer one
            content = self._store.describe(self._usage)
            await asyncio.to_thread(self._store.save, content)

    async def persisted_totals(self) -> dict[str, UsageRecord]:
        """Return this router's totals by tenant, after saving them.

        A restarted router must not start below what it has reported.
        """
        totals = {name: usage.totals() for name, usage in self._usage}
        await self.save()
        return totals

    def apply_cluster_totals(
        self, totals: ClusterTotals, *, reported: Mapping[str, UsageRecord], now_s: float
    ) -> None:
        """Replace the usage through other routers.

        Args:
            totals: usage over all routers.
            reported: this router's part of it, by tenant.
            now_s: current time, seconds since the epoch.
        """
        remote = {
            name: total.minus(reported.get(name, UsageRecord()))
            for name, total in totals.tenants.items()
        }
        self.remote = RemoteUsage(remote, min(totals.since_s, self.since_s), now_s)

    def cluster_total(self, tenant: str) -> UsageRecord:
        """Return a tenant's usage over all routers, as far as it is known."""
        own = self._usage.for_tenant(tenant).totals()
        return own + self.remote.tenants.get(tenant, UsageRecord())
