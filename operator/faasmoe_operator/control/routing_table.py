"""Publishes the routing table that routers watch, with a history of changes.

A watcher asks for the changes since its version and then waits for a newer one, so a slow watcher
accumulates no unread messages. One whose version is older than the history gets the whole table.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable
from faasmoe_operator.aio import ChangeNotifier

MAX_HISTORY = 1024

Addresses = Mapping[str, tuple[str, ...]]


class RoutingTablePublisher:
    """The current routing table and its recent changes.

    Args:
        functions: every function, in the order of the table.
        model_digest: digest of their store.

    Attributes:
        epoch: identity of this table's history; another controller has another one.
        version: version of the table, increased by every change.
        n_watchers: routers that watch the table now.
        is_closed: whether the table will not change any more, because its controller has stopped.
    """

    def __init__(self, functions: Sequence[FunctionSpec], *, model_digest: str) -> None:
        self._digest = model_digest
        self._entries = {spec.id: FunctionEndpoints(spec) for spec in functions}
        self._history: deque[tuple[str, ...]] = deque(maxlen=MAX_HISTORY)
        self._change_notifier = ChangeNotifier()
        self.epoch = secrets.token_hex(8)
        self.version = 1
        self.n_watchers = 0
        self.is_closed = False

    @property
    def table(self) -> RoutingTable:
        """The whole table."""
        return RoutingTable(self._digest, self.version, tuple(self._entries.values()))

    def publish(self, addresses: Addresses) -> None:
        """Replace the addresses of all functions; omitted functions have none.

        Args:
            addresses: `host:port` of the ready replicas, by function id.
        """
        changed = tuple(
            name
            for name, entry in self._entries.items()
            if entry.addresses != addresses.get(name, ())
        )
        if not changed:
            return
        for name in changed:
            entry = self._entries[name]
            self._entries[name] = replace(entry, addresses=addresses.get(name, ()))
        self._history.append(changed)
        self.version += 1
        self._change_notifier.notify()

    def changes_since(self, version: int) -> Addresses | None:
        """Return the addresses changed since a version; None if the history does not reach back."""
        n_missed = self.version - version
        if not 0 <= n_missed <= len(self._history):
            return None
        missed = list(self._history)[len(self._history) - n_missed :]
        names = dict.fromkeys(name for changed in missed for name in changed)
        return {name: self._entries[name].addresses for name in names}

    async def wait_for_newer(self, version: int) -> None:
        """Wait until there is a newer version or the table is closed."""
        await self._change_notifier.wait_for(lambda: self.is_closed or self.version > version)

    def close(self) -> None:
        """Mark the table as final and wake its watchers, which then reconnect."""
        self.is_closed = True
        self._change_notifier.notify()
