"""The accounts' file: written whole, beside the old one, and then put in its place.

This router's accounts, kept in its file, and with them what was used through all other routers.

What the others have is known from the control plane, which adds up all routers' books; it knows
this book as it was told last, and the rest is added here. So the sum holds whether the control
plane is there or not, and is behind by what others have not told yet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.usage import RouterUsage

logger = logging.getLogger(__name__)


FILE_NAME = "usage.json"


class UsageFileStore:
    """Keeps accounts in a folder, which belongs to one router.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RouterConfigError(f"FAASMOE_STATE_DIR: {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RouterConfigError(f"FAASMOE_STATE_DIR: {folder}: cannot be written to")
        self._path = folder / FILE_NAME
        self._last_content = ""

    def load(self) -> RouterUsage:
        """Return the accounts as they were kept; new ones if there are none.

        What cannot be read is put aside, for somebody to look at.
        """
        try:
            return RouterUsage.from_json(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged_path = self._path.with_suffix(".damaged")
            logger.error("%s cannot be read: %s; moved to %s", self._path, error, damaged_path.name)
            self._path.replace(damaged_path)
        return RouterUsage(time.time())

    def save(self, content: str) -> None:
        """Write the accounts, unless they are what was written last; failing is logged."""
        if content == self._last_content:
            return
        temp_path = self._path.with_suffix(".new")
        try:
            with temp_path.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temp_path.replace(self._path)
        except OSError as error:
            logger.error("Tenant usage cannot be saved: %s: %s", self._path, error.strerror)
        else:
            self._last_content = content


UsageFields = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RemoteUsage:
    """What was used through the other routers.

    Attributes:
        tenants: each tenant's use.
        since_s: when the first of all books was opened, seconds since the epoch.
        as_of_s: when that was heard, seconds since the epoch; None if it never was.
    """

    tenants: Mapping[str, UsageFields]
    since_s: float
    as_of_s: float | None = None


class ClusterUsage:
    """The accounts of one router among several. Belongs to the event loop.

    Args:
        accounts: this router's.
        file: where they are kept; None keeps them in memory only.

    Attributes:
        others: what was used through the other routers.
    """

    def __init__(self, usage: RouterUsage, store: UsageFileStore | None = None) -> None:
        self._usage = usage
        self._store = store
        self.remote = RemoteUsage({}, usage.since_s)

    @property
    def ledger_id(self) -> str:
        """The book's name, which no other router's has."""
        return self._usage.ledger_id

    @property
    def since_s(self) -> float:
        """When this book was opened, seconds since the epoch."""
        return self._usage.since_s

    async def save(self) -> None:
        """Write the accounts to their file."""
        if self._store is not None:
            content = json.dumps(self._usage.to_json())
            await asyncio.to_thread(self._store.save, content)

    async def persisted_totals(self) -> dict[str, UsageFields]:
        """Return each tenant's totals in this book; they are in its file before they are told."""
        totals: dict[str, UsageFields] = {name: a.totals() for name, a in self._usage}
        await self.save()
        return totals

    def apply_cluster_totals(
        self,
        totals: Mapping[str, UsageFields],
        *,
        reported: Mapping[str, UsageFields],
        since_s: float,
        now_s: float,
    ) -> None:
        """Take what was used over all routers.

        Args:
            totals: each tenant's use.
            told: what of it is this book's.
            since_s: when the first of all books was opened, seconds since the epoch.
            now_s: the time of day, seconds since the epoch.
        """
        remote = {name: _subtract(total, reported.get(name, {})) for name, total in totals.items()}
        self.remote = RemoteUsage(remote, min(since_s, self.since_s), now_s)

    def cluster_total(self, tenant: str) -> dict[str, float]:
        """Return what a tenant has used over all routers, as far as it is known."""
        remote = self.remote.tenants.get(tenant, {})
        own = self._usage.for_tenant(tenant).totals()
        return {name: number + remote.get(name, 0) for name, number in own.items()}


def _subtract(total: UsageFields, own: UsageFields) -> dict[str, float]:
    return {name: max(number - own.get(name, 0), 0) for name, number in total.items()}
