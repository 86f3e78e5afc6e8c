"""APIs that a cluster may serve or not: found when they come, let go when they go.

What there is is asked for once, at the start. Later an API that is missing is looked for only while
a MoEModel asks for it: when nothing is wanted, nothing is asked. That one has gone is learnt from
the list of its objects that follows when its watch breaks off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import (
    HTTP_ROUTE,
    MOEMODEL,
    OPTIONAL,
    SERVICE_MONITOR,
    Kind,
    Object,
)

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 15.0
FIELDS: Mapping[Kind, tuple[str, str]] = {
    HTTP_ROUTE: ("networking", "httpRoute"),
    SERVICE_MONITOR: ("monitoring", "serviceMonitor"),
}
"""Where a MoEModel asks for one: part and field of its spec."""


class Discovery(Protocol):
    """Tells what the cluster serves; `client.KubeClient` does."""

    async def serves(self, kind: Kind) -> bool:
        """Return whether the cluster serves a kind of object; raises ApiError."""
        ...


class Followers(Protocol):
    """Watch and list the objects of a kind."""

    def follow(self, kind: Kind) -> None:
        """Begin to follow a kind."""
        ...

    def leave(self, kind: Kind) -> None:
        """Follow a kind no more, and forget its objects."""
        ...


class OptionalApis:
    """The optional APIs that the cluster serves now.

    Args:
        discovery: tells what the cluster serves.
        cache: where the MoEModels are.
        visit: has a model visited.
    """

    def __init__(
        self, discovery: Discovery, cache: ObjectCache, *, visit: Callable[[ModelKey], None]
    ) -> None:
        self._discovery, self._cache, self._visit = discovery, cache, visit
        self._served: set[Kind] = set()
        self._followers: Followers | None = None

    def versions(self) -> frozenset[str]:
        """Return group and version of each that is served."""
        return frozenset(kind.api_version for kind in self._served)

    async def begin(self, followers: Followers) -> None:
        """Ask for all of them, and have followed those that are served; raises ApiError."""
        self._followers = followers
        for kind in OPTIONAL:
            await self._ask(kind)

    async def run(self) -> None:
        """Look for those that are asked for and missing, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            await self.look()

    async def look(self) -> None:
        """Look once for those that are asked for and missing."""
        for kind in OPTIONAL:
            if kind in self._served or not self._askers(kind):
                continue
            try:
                await self._ask(kind)
            except ApiError as error:
                logger.warning("whether %s are served is not known: %s", kind, error)

    def lose(self, kind: Kind) -> None:
        """Take that a kind is served no more; nothing happens if it is not one of these."""
        if kind not in self._served or self._followers is None:
            return
        logger.warning("%s are served no more", kind)
        self._served.remove(kind)
        self._followers.leave(kind)
        self._visit_askers(kind)

    async def _ask(self, kind: Kind) -> None:
        if kind in self._served or not await self._discovery.serves(kind):
            return
        assert self._followers is not None
        logger.info("%s are served", kind)
        self._served.add(kind)
        self._followers.follow(kind)
        self._visit_askers(kind)

    def _visit_askers(self, kind: Kind) -> None:
        for key in self._askers(kind):
            self._visit(key)

    def _askers(self, kind: Kind) -> list[ModelKey]:
        return list(askers(self._cache.all(MOEMODEL), kind))


def askers(models: Iterable[Object], kind: Kind) -> Iterable[ModelKey]:
    """Yield the names of the models whose spec asks for objects of an optional kind."""
    part, field = FIELDS[kind]
    for model in models:
        given = model.get("spec", {}).get(part) or {}
        if given.get(field) is not None:
            yield ModelKey(model["metadata"]["namespace"], model["metadata"]["name"])
