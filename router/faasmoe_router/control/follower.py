"""Following the function table: reads the stream, reads it again when it breaks.

While the control plane is away, the last table stays in use.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Protocol

from faasmoe_expert.table import FunctionTable, TableError
from faasmoe_router.control.backoff import Backoff
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.errors import ControlError, Garbage, Unreachable
from faasmoe_router.control.messages import Change, Message, Place, Snapshot
from faasmoe_router.control.metrics import ControlMetrics

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
MOST_RETRY_S = 2.0
SOUND_AFTER_S = 5.0  # a stream that lasts so long was a good one


class TableUser(Protocol):
    """Who routes by the table; the dispatcher does."""

    def replace_table(self, table: FunctionTable) -> None:
        """Take another table; raises TableError and keeps the old one."""

    def move_functions(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Take other addresses for some functions; raises TableError and changes nothing."""


class TableFollower:
    """Keeps a table user's table as the control plane tells it.

    Attributes:
        has_table: whether a table was ever told.
    """

    def __init__(
        self,
        client: ControlClient,
        user: TableUser,
        *,
        metrics: ControlMetrics,
        on_table: Callable[[], None],
        on_epoch: Callable[[], None],
    ) -> None:
        """Make a follower.

        Args:
            client: where the stream comes from.
            user: who gets the table.
            metrics: counters.
            on_table: called after every change of the table.
            on_epoch: called, before that, when another control process has begun.
        """
        self.has_table = False
        self._client = client
        self._user = user
        self._metrics = metrics
        self._on_table = on_table
        self._on_epoch = on_epoch
        self._place: Place | None = None
        self._epoch: str | int | None = None
        self._was_away = False

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff = Backoff(FIRST_RETRY_S, MOST_RETRY_S)
        while True:
            began_s = time.monotonic()
            try:
                await self._follow()
            except ControlError as error:
                self._lose(error)
            finally:
                self._metrics.connected.set(0)
            if time.monotonic() - began_s >= SOUND_AFTER_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s(random.random()))

    async def _follow(self) -> None:
        async with aclosing(self._client.follow(self._place)) as messages:
            async for message in messages:
                self._take(message)
                self._metrics.connected.set(1)
                if self._was_away:
                    self._was_away = False
                    logger.info("The control plane is there")
        raise Unreachable("the table stream ended")

    def _take(self, message: Message) -> None:
        try:
            if isinstance(message, Snapshot):
                self._take_snapshot(message)
            elif isinstance(message, Change):
                self._take_change(message)
        except TableError as error:
            raise Garbage(str(error)) from error

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        self._user.replace_table(snapshot.table)
        if snapshot.place.epoch != self._epoch:
            self._epoch = snapshot.place.epoch
            self._on_epoch()
        self._move_to(snapshot.place)

    def _take_change(self, change: Change) -> None:
        if self._place is None:
            raise Garbage("kind: got a change, expected a snapshot first")
        if change.version <= self._place.version:
            raise Garbage(
                f"version: got {change.version}, expected more than {self._place.version}"
            )
        self._user.move_functions(change.version, change.addresses)
        self._move_to(Place(self._place.epoch, change.version))

    def _move_to(self, place: Place) -> None:
        self.has_table = True
        self._place = place
        self._metrics.table_version.set(place.version)
        self._on_table()

    def _lose(self, error: ControlError) -> None:
        if isinstance(error, Garbage):
            self._place = None  # the next stream begins with a snapshot
        if not self._was_away:
            self._was_away = True
            logger.warning("The control plane is away, the last table stays in use: %s", error)
