"""How long to wait before a call is tried again. Pure.

Following the function table: reads the stream, reads it again when it breaks.

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

from faasmoe_contracts.routing_table import RoutingTable, RoutingTableError
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.messages import TableMessage, TableSnapshot, TableUpdate, TableVersion
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.errors import ControlError, ControlProtocolError, ControlUnreachable

logger = logging.getLogger(__name__)


class ReconnectBackoff:
    """Waits that double from `first_s` to `most_s` until `reset`."""

    def __init__(self, initial_s: float, max_s: float) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._delay_s = initial_s

    def next_delay_s(self, jitter: float) -> float:
        """Return the next wait.

        Args:
            chance: a random number in 0..1; spreads the routers that lost one control process.
        """
        delay_s = self._delay_s * (0.5 + jitter / 2)
        self._delay_s = min(self._delay_s * 2, self._max_s)
        return delay_s

    def reset(self) -> None:
        """Begin again with the first wait."""
        self._delay_s = self._initial_s


RECONNECT_INITIAL_S = 0.1
RECONNECT_MAX_S = 2.0
STABLE_AFTER_S = 5.0  # a stream that lasts so long was a good one


class RoutingTableConsumer(Protocol):
    """Who routes by the table; the dispatcher does."""

    def replace_table(self, table: RoutingTable) -> None:
        """Take another table; raises TableError and keeps the old one."""

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Take other addresses for some functions; raises TableError and changes nothing."""


class TableWatcher:
    """Keeps a table user's table as the control plane tells it.

    Attributes:
        has_table: whether a table was ever told.
    """

    def __init__(
        self,
        client: ControlClient,
        consumer: RoutingTableConsumer,
        *,
        metrics: ControlLinkMetrics,
        on_table_changed: Callable[[], None],
        on_new_epoch: Callable[[], None],
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
        self._consumer = consumer
        self._metrics = metrics
        self._on_table_changed = on_table_changed
        self._on_new_epoch = on_new_epoch
        self._version: TableVersion | None = None
        self._epoch: str | int | None = None
        self._is_disconnected = False

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff = ReconnectBackoff(RECONNECT_INITIAL_S, RECONNECT_MAX_S)
        while True:
            started_s = time.monotonic()
            try:
                await self._watch()
            except ControlError as error:
                self._on_disconnect(error)
            finally:
                self._metrics.connected.set(0)
            if time.monotonic() - started_s >= STABLE_AFTER_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_delay_s(random.random()))

    async def _watch(self) -> None:
        async with aclosing(self._client.watch_table(self._version)) as messages:
            async for message in messages:
                self._apply(message)
                self._metrics.connected.set(1)
                if self._is_disconnected:
                    self._is_disconnected = False
                    logger.info("The control plane is connected")
        raise ControlUnreachable("the table stream ended")

    def _apply(self, message: TableMessage) -> None:
        try:
            if isinstance(message, TableSnapshot):
                self._apply_snapshot(message)
            elif isinstance(message, TableUpdate):
                self._apply_update(message)
        except RoutingTableError as error:
            raise ControlProtocolError(str(error)) from error

    def _apply_snapshot(self, snapshot: TableSnapshot) -> None:
        self._consumer.replace_table(snapshot.table)
        if snapshot.version.epoch != self._epoch:
            self._epoch = snapshot.version.epoch
            self._on_new_epoch()
        self._advance_to(snapshot.version)

    def _apply_update(self, update: TableUpdate) -> None:
        if self._version is None:
            raise ControlProtocolError("kind: got a change, expected a snapshot first")
        if update.version <= self._version.version:
            raise ControlProtocolError(
                f"version: got {update.version}, expected more than {self._version.version}"
            )
        self._consumer.update_addresses(update.version, update.addresses)
        self._advance_to(TableVersion(self._version.epoch, update.version))

    def _advance_to(self, version: TableVersion) -> None:
        self.has_table = True
        self._version = version
        self._metrics.routing_table_version.set(version.version)
        self._on_table_changed()

    def _on_disconnect(self, error: ControlError) -> None:
        if isinstance(error, ControlProtocolError):
            self._version = None  # the next stream begins with a snapshot
        if not self._is_disconnected:
            self._is_disconnected = True
            logger.warning(
                "The control plane is unreachable, keeping the last routing table: %s", error
            )
