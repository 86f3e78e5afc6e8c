"""Keeps the routing table up to date from the control plane's table stream.

Reconnects when the stream breaks and resumes from the last version. While the control plane is
unreachable, the last table stays in use.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Protocol

from faasmoe_contracts.backoff import ExponentialBackoff
from faasmoe_contracts.control_messages import (
    TableMessage,
    TableSnapshot,
    TableUpdate,
    TableVersion,
)
from faasmoe_contracts.routing_table import RoutingTable, RoutingTableError
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.errors import ControlError, ControlProtocolError, ControlUnreachable

logger = logging.getLogger(__name__)

RECONNECT_INITIAL_S = 0.1
RECONNECT_MAX_S = 2.0
RECONNECT_JITTER = 0.5  # spreads the routers that lost the same control process
STABLE_AFTER_S = 5.0  # a stream that lasts this long resets the back-off


class RoutingTableConsumer(Protocol):
    """User of the routing table, such as the dispatcher."""

    def replace_table(self, table: RoutingTable) -> None:
        """Use another table; raises RoutingTableError and keeps the old one."""

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Use other addresses for some functions; raises RoutingTableError and changes nothing."""


class TableWatcher:
    """Watches the table stream and applies it to a consumer.

    Args:
        client: source of the stream.
        consumer: user of the table.
        metrics: metrics of the link.
        on_table_changed: called after every change of the table.
        on_new_epoch: called before that when the control process has restarted.

    Attributes:
        has_table: whether a table was ever received.
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
        """Watch until cancelled."""
        backoff = ExponentialBackoff(RECONNECT_INITIAL_S, RECONNECT_MAX_S, jitter=RECONNECT_JITTER)
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
            self._version = None  # so that the next stream starts with a snapshot
        if not self._is_disconnected:
            self._is_disconnected = True
            logger.warning(
                "The control plane is unreachable, keeping the last routing table: %s", error
            )
