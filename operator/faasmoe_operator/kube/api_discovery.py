"""Discovery of optional APIs, such as the Gateway API, while the operator runs.

All optional kinds are looked up once at the start. A missing one is looked up again only while a
MoEModel requests it, so that an idle cluster gets no requests. The kind's informer notices when an
API is removed.
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
    POD_MONITOR,
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
    POD_MONITOR: ("monitoring", "podMonitor"),
}
"""For each optional kind the section and field of a MoEModel's spec that request it."""


class Discovery(Protocol):
    """Looks up what the cluster serves; KubeClient implements it."""

    async def is_served(self, kind: Kind) -> bool:
        """Return whether the cluster serves a kind; raises KubeApiError."""
        ...


class OptionalInformers(Protocol):
    """Informers of optional kinds; Informers implements it."""

    def start_optional(self, kind: Kind) -> None:
        """Start to follow a kind."""
        ...

    def stop_optional(self, kind: Kind) -> None:
        """Stop following a kind and remove its objects from the cache."""
        ...


class OptionalApis:
    """The optional kinds that the cluster serves.

    Args:
        discovery: looks up what the cluster serves.
        cache: holds the MoEModels.
        enqueue: enqueues a model to reconcile.
    """

    def __init__(
        self, discovery: Discovery, cache: ObjectCache, *, enqueue: Callable[[ModelKey], None]
    ) -> None:
        self._discovery, self._cache, self._enqueue = discovery, cache, enqueue
        self._served: set[Kind] = set()
        self._informers: OptionalInformers | None = None

    def served_versions(self) -> frozenset[str]:
        """Return group and version of each optional kind that is served."""
        return frozenset(kind.api_version for kind in self._served)

    async def start(self, informers: OptionalInformers) -> None:
        """Look all optional kinds up and follow those that are served; raises KubeApiError."""
        self._informers = informers
        for kind in OPTIONAL_KINDS:
            await self._discover(kind)

    async def run(self) -> None:
        """Look up requested kinds that are missing, periodically, until cancelled."""
        while True:
            await asyncio.sleep(DISCOVERY_PERIOD_S)
            await self.discover_missing()

    async def discover_missing(self) -> None:
        """Look up requested kinds that are missing, once."""
        for kind in OPTIONAL_KINDS:
            if kind in self._served or not self._requesters(kind):
                continue
            try:
                await self._discover(kind)
            except KubeApiError as error:
                logger.warning("%s: API discovery failed: %s", kind, error)

    def mark_not_served(self, kind: Kind) -> None:
        """Stop following a kind that is no longer served; ignores kinds that are not followed."""
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
    """Yield the keys of the models whose spec requests objects of an optional kind."""
    section, field = REQUESTING_FIELDS[kind]
    for model in models:
        values = model.get("spec", {}).get(section) or {}
        if values.get(field) is not None:
            yield ModelKey(model["metadata"]["namespace"], model["metadata"]["name"])
