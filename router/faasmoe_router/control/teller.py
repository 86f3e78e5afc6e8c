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

from faasmoe_router.control.errors import ControlError, Garbage

logger = logging.getLogger(__name__)

TELL_INTERVAL_S = 5.0
ALONE_INTERVAL_S = 60.0  # while nothing is new and there is no other router to hear of

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
Totals = Mapping[str, Mapping[str, float]]


class TakesUsage(Protocol):
    """Who is told; `ControlClient` is one."""

    async def usage(self, body: dict[str, Any]) -> Any:
        """Tell a book's totals; return those of all books; raises ControlError."""


class KeepsBooks(Protocol):
    """This router's book; `Tenancy.books` is one."""

    @property
    def name(self) -> str:
        """The book's name, which no other router's has."""

    @property
    def since_s(self) -> float:
        """When it was opened, seconds since the epoch."""

    async def statement(self) -> Totals:
        """Return each tenant's totals."""

    def hear(self, totals: Totals, *, told: Totals, since_s: float, now_s: float) -> None:
        """Take each tenant's totals over all routers."""


class UsageTeller:
    """Tells one router's book.

    Args:
        client: who is told.
        books: the book.
        n_routers: tells how many routers there are.
        interval_s: time between two tellings.
    """

    def __init__(
        self,
        client: TakesUsage,
        books: KeepsBooks,
        *,
        n_routers: Callable[[], int],
        interval_s: float = TELL_INTERVAL_S,
    ) -> None:
        self._client = client
        self._books = books
        self._n_routers = n_routers
        self._interval_s = interval_s
        self._told: Totals | None = None
        self._told_s = 0.0
        self._failed = False

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(self._interval_s)

    async def end(self) -> None:
        """Tell a last time."""
        await self.tell(ends=True)

    async def tell(self, *, ends: bool = False) -> None:
        """Tell the totals as they are now; failing is logged.

        Args:
            ends: whether this router ends.
        """
        told = await self._books.statement()
        if not ends and self._is_known(told):
            return
        try:
            await self._exchange(told, ends=ends)
        except ControlError as error:
            if not self._failed:
                logger.warning("The tenants' accounts could not be told: %s", error)
            self._failed = True
        else:
            self._failed = False
            self._told, self._told_s = told, time.monotonic()

    def _is_known(self, told: Totals) -> bool:
        """Return whether telling would be no news, to either side."""
        is_recent = time.monotonic() - self._told_s < ALONE_INTERVAL_S
        return told == self._told and is_recent and self._n_routers() == 1

    async def _exchange(self, told: Totals, *, ends: bool) -> None:
        book = {"book": self._books.name, "since_s": self._books.since_s}
        answer = await self._client.usage({**book, "ends": ends, "tenants": told})
        try:
            since_s, totals = read_totals(answer)
        except DAMAGED as error:
            raise Garbage(f"usage: {error!r}") from error
        self._books.hear(totals, told=told, since_s=since_s, now_s=time.time())


def read_totals(answer: Any) -> tuple[float, dict[str, dict[str, float]]]:
    """Read what was used over all routers, and since when; raises DAMAGED."""
    tenants = {
        str(name): {str(field): _number(number) for field, number in numbers.items()}
        for name, numbers in answer["tenants"].items()
    }
    return _number(answer["since_s"]), tenants


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"got {value!r}, expected numbers of 0 or more")
    return value
