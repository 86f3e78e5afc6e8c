"""This router's accounts, kept in its file, and with them what was used through all other routers.

What the others have is known from the control plane, which adds up all routers' books; it knows
this book as it was told last, and the rest is added here. So the sum holds whether the control
plane is there or not, and is behind by what others have not told yet.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass

from faasmoe_router.tenants.usage import Accounts
from faasmoe_router.tenants.usage_file import UsageFile

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Others:
    """What was used through the other routers.

    Attributes:
        tenants: each tenant's use.
        since_s: when the first of all books was opened, seconds since the epoch.
        as_of_s: when that was heard, seconds since the epoch; None if it never was.
    """

    tenants: Mapping[str, Numbers]
    since_s: float
    as_of_s: float | None = None


class Books:
    """The accounts of one router among several. Belongs to the event loop.

    Args:
        accounts: this router's.
        file: where they are kept; None keeps them in memory only.

    Attributes:
        others: what was used through the other routers.
    """

    def __init__(self, accounts: Accounts, file: UsageFile | None = None) -> None:
        self._accounts = accounts
        self._file = file
        self.others = Others({}, accounts.since_s)

    @property
    def name(self) -> str:
        """The book's name, which no other router's has."""
        return self._accounts.book

    @property
    def since_s(self) -> float:
        """When this book was opened, seconds since the epoch."""
        return self._accounts.since_s

    async def save(self) -> None:
        """Write the accounts to their file."""
        if self._file is not None:
            content = json.dumps(self._accounts.to_json())
            await asyncio.to_thread(self._file.save, content)

    async def statement(self) -> dict[str, Numbers]:
        """Return each tenant's totals in this book; they are in its file before they are told."""
        told: dict[str, Numbers] = {name: a.statement() for name, a in self._accounts}
        await self.save()
        return told

    def hear(
        self,
        totals: Mapping[str, Numbers],
        *,
        told: Mapping[str, Numbers],
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
        others = {name: _less(total, told.get(name, {})) for name, total in totals.items()}
        self.others = Others(others, min(since_s, self.since_s), now_s)

    def whole(self, tenant: str) -> dict[str, float]:
        """Return what a tenant has used over all routers, as far as it is known."""
        others = self.others.tenants.get(tenant, {})
        own = self._accounts.of(tenant).statement()
        return {name: number + others.get(name, 0) for name, number in own.items()}


def _less(total: Numbers, own: Numbers) -> dict[str, float]:
    return {name: max(number - own.get(name, 0), 0) for name, number in total.items()}
