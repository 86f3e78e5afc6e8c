"""The function table that routers follow: versions, and what changed between them.

Readers ask for what is new since a version and wait for more, so that none can pile up unread
changes; one that fell behind the history gets the whole table.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable
from faasmoe_operator.platforms.registry import ChangeNotifier

MAX_HISTORY = 1024

Addresses = Mapping[str, tuple[str, ...]]


class RoutingTablePublisher:
    """The current table and the changes that led to it.

    Args:
        functions: every function, in the order of the table.
        model_digest: digest of their store.
    """

    def __init__(self, functions: Sequence[FunctionSpec], *, model_digest: str) -> None:
        self._digest = model_digest
        self._entries = {spec.id: FunctionEndpoints(spec) for spec in functions}
        self._history: deque[tuple[str, ...]] = deque(maxlen=MAX_HISTORY)
        self._change_notifier = ChangeNotifier()
        self.epoch = secrets.token_hex(8)
        self.version = 1
        self.n_watchers = 0
        """Routers that follow the table at this moment."""
        self.is_closed = False
        """Whether there will be no more changes: another control core may go on."""

    @property
    def table(self) -> RoutingTable:
        """The whole table."""
        return RoutingTable(self._digest, self.version, tuple(self._entries.values()))

    def publish(self, addresses: Addresses) -> None:
        """Take the places where functions serve now; functions left out serve nowhere."""
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
        """Return what changed since a version; None if that is not known any more."""
        n_missed = self.version - version
        if not 0 <= n_missed <= len(self._history):
            return None
        missed = list(self._history)[len(self._history) - n_missed :]
        names = dict.fromkeys(name for changed in missed for name in changed)
        return {name: self._entries[name].addresses for name in names}

    async def wait_for_newer(self, version: int) -> None:
        """Wait until there is a version beyond this one, or the feed is closed."""
        await self._change_notifier.wait_for(lambda: self.is_closed or self.version > version)

    def close(self) -> None:
        """Say that there will be no more changes; its readers go and ask anew."""
        self.is_closed = True
        self._change_notifier.notify()
