"""Lists that fill the cache at the start, and find what the watches have missed.

A watch that was cut off for long begins with a new list, and what was deleted in between is then
told by nobody. So each kind is listed again now and then, and a minute after what makes that likely
to matter: its watch has begun anew, or we have deleted an object of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import ApiError, NotFound
from faasmoe_operator.kube.kinds import MOEMODEL, Kind, Object
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL

logger = logging.getLogger(__name__)

OURS = f"{MANAGED_BY_LABEL}={FIELD_MANAGER}"
DOUBT_S = 60.0
PERIOD_S = 1800.0
TICK_S = 5.0


def selector_of(kind: Kind) -> str:
    """Return the labels of the objects of a kind that concern us: MoEModels do all."""
    return "" if kind == MOEMODEL else OURS


class Resync:
    """Keeps the cache free of what is gone.

    Args:
        api: the API server.
        cache: what to keep.
        kinds: what is watched.
        namespaces: where; empty for everywhere.
        gone: told that a kind is served no more.
        clock: a clock that only goes forward.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        *,
        kinds: Sequence[Kind],
        namespaces: Sequence[str],
        gone: Callable[[Kind], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._cache, self._clock = api, cache, clock
        self._gone = gone
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._due = dict.fromkeys(kinds, -float("inf"))
        self._new: set[Kind] = set()

    def add(self, kind: Kind) -> None:
        """List a kind from now on; soon again, as its watch may begin after the first list."""
        self._due[kind] = -float("inf")
        self._new.add(kind)

    def remove(self, kind: Kind) -> None:
        """List a kind no more, and forget its objects."""
        self._due.pop(kind, None)
        self._cache.replace(kind, (), known=self._cache.known(kind, None))

    async def fill(self) -> None:
        """List everything once; raises ApiError."""
        for kind in tuple(self._due):
            await self._list(kind)

    async def run(self) -> None:
        """List each kind when it is due, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            await self.list_due()

    async def list_due(self) -> None:
        """List the kinds that are due; one that is refused is due again soon."""
        for kind in [kind for kind, due in self._due.items() if due <= self._clock()]:
            await self._try(kind)

    def doubt(self, *kinds: Kind) -> None:
        """Have kinds listed soon, or all if none is given."""
        soon = self._clock() + DOUBT_S
        for kind in kinds or self._due:
            if kind in self._due:
                self._due[kind] = min(self._due[kind], soon)

    async def _try(self, kind: Kind) -> None:
        try:
            await self._list(kind)
        except ApiError as error:
            logger.warning("%s are not listed anew: %s", kind, error)
            if kind in self._due:
                self._due[kind] = self._clock() + DOUBT_S

    async def _list(self, kind: Kind) -> None:
        gone = 0
        for namespace in self._namespaces:
            known = self._cache.known(kind, namespace)
            listed = await self._ask(kind, namespace)
            gone += self._cache.replace(kind, listed, known=known)
        self._due[kind] = self._clock() + (DOUBT_S if kind in self._new else PERIOD_S)
        self._new.discard(kind)
        if gone:
            logger.info("%d %s had gone unnoticed", gone, kind)

    async def _ask(self, kind: Kind, namespace: str | None) -> list[Object]:
        try:
            return await self._api.list(kind, namespace, label_selector=selector_of(kind))
        except NotFound:
            self._gone(kind)
            raise
