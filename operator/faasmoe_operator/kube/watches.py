"""The watches of one operator: one over what every cluster serves, one for each optional kind.

An optional kind that goes takes its own watch down and no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from faasmoe_operator.kube.kinds import Kind
from faasmoe_operator.kube.resync import Resync
from faasmoe_operator.kube.triggers import Feed
from faasmoe_operator.kube.watcher import Watcher


class Watches:
    """Watches and lists kinds.

    Args:
        namespaces: where; empty for everywhere.
        feed: takes the events.
        resync: lists what the watches may have missed.
        group: the tasks of the operator.
    """

    def __init__(
        self, namespaces: Sequence[str], feed: Feed, resync: Resync, group: asyncio.TaskGroup
    ) -> None:
        self._namespaces = namespaces
        self._feed, self._resync, self._group = feed, resync, group
        self._optional: dict[Kind, asyncio.Task[None]] = {}

    def begin(self, kinds: Sequence[Kind]) -> None:
        """Watch kinds that are there as long as the operator is."""
        self._group.create_task(self._watcher(kinds).run())

    def follow(self, kind: Kind) -> None:
        """Begin to watch and to list a kind that has come."""
        self._resync.add(kind)
        self._optional[kind] = self._group.create_task(self._watch(kind))

    def leave(self, kind: Kind) -> None:
        """Watch and list a kind no more, and forget its objects."""
        self._resync.remove(kind)
        self._optional.pop(kind).cancel()

    async def _watch(self, kind: Kind) -> None:
        await self._feed.has_begun.wait()  # the first event is to tell that the others are on
        with suppress(TimeoutError):  # its thread does not end: it holds nothing up
            await self._watcher((kind,)).run()

    def _watcher(self, kinds: Sequence[Kind]) -> Watcher:
        return Watcher(
            kinds=kinds,
            namespaces=self._namespaces,
            deliver=self._feed.take,
            interrupted=lambda: self._resync.doubt(*kinds),
        )
