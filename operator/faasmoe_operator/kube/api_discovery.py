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
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.types import (
    HTTP_ROUTE,
    MOEMODEL,
    OPTIONAL_KINDS,
    SERVICE_MONITOR,
    Kind,
    ModelKey,
    Object,
)

logger = logging.getLogger(__name__)

DISCOVERY_PERIOD_S = 15.0
REQUESTING_FIELDS: Mapping[Kind, tuple[str, str]] = {
    HTTP_ROUTE: ("networking", "httpRoute"),
    SERVICE_MONITOR: ("monitoring", "serviceMonitor"),
}
"""Where a MoEModel asks for one: part and field of its spec."""


class Discovery(Protocol):
    """Tells what the cluster serves; `client.KubeClient` does."""

    async def is_served(self, kind: Kind) -> bool:
        """Return whether the cluster serves a kind of object; raises ApiError."""
        ...


class OptionalInformers(Protocol):
    """Watch and list the objects of a kind."""

    def start_optional(self, kind: Kind) -> None:
        """Begin to follow a kind."""
        ...

    def stop_optional(self, kind: Kind) -> None:
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
        self, discovery: Discovery, cache: ObjectCache, *, enqueue: Callable[[ModelKey], None]
    ) -> None:
        self._discovery, self._cache, self._enqueue = discovery, cache, enqueue
        self._served: set[Kind] = set()
        self._informers: OptionalInformers | None = None

    def served_versions(self) -> frozenset[str]:
        """Return group and version of each that is served."""
        return frozenset(kind.api_version for kind in self._served)

    async def start(self, informers: OptionalInformers) -> None:
        """Ask for all of them, and have followed those that are served; raises ApiError."""
        self._informers = informers
        for kind in OPTIONAL_KINDS:
            await self._discover(kind)

    async def run(self) -> None:
        """Look for those that are asked for and missing, until cancelled."""
        while True:
            await asyncio.sleep(DISCOVERY_PERIOD_S)
            await self.discover_missing()

    async def discover_missing(self) -> None:
        """Look once for those that are asked for and missing."""
        for kind in OPTIONAL_KINDS:
            if kind in self._served or not self._requesters(kind):
                continue
            try:
                await self._discover(kind)
            except KubeApiError as error:
                logger.warning("%s: API discovery failed: %s", kind, error)

    def mark_not_served(self, kind: Kind) -> None:
        """Take that a kind is served no more; nothing happens if it is not one of these."""
        if kind not in self._served or self._informers is None:
            return
        logger.warning("%s: API is no longer served", kind)
        self._served.remove(kind)
        self._informers.stop_optional(kind)
        self._enqueue_requesters(kind)

    async def _discover(self, kind: Kind) -> None:
        if kind in self._served or not await self._discovery.is_served(kind):
            return
        assert self._informers is not None
        logger.info("%s: API is served", kind)
        self._served.add(kind)
        self._informers.start_optional(kind)
        self._enqueue_requesters(kind)

    def _enqueue_requesters(self, kind: Kind) -> None:
        for key in self._requesters(kind):
            self._enqueue(key)

    def _requesters(self, kind: Kind) -> list[ModelKey]:
        return list(models_requesting(self._cache.list_all(MOEMODEL), kind))


def models_requesting(models: Iterable[Object], kind: Kind) -> Iterable[ModelKey]:
    """Yield the names of the models whose spec asks for objects of an optional kind."""
    section, field = REQUESTING_FIELDS[kind]
    for model in models:
        values = model.get("spec", {}).get(section) or {}
        if values.get(field) is not None:
            yield ModelKey(model["metadata"]["namespace"], model["metadata"]["name"])
