"""Reflectors keep the object cache in step with the API server, as client-go's informers do.

A Reflector lists one kind, brings the cache to the state of that list, and watches from the list's
resourceVersion. A watch that ends, fails or falls silent is resumed from the version seen last,
which bookmarks keep recent. Only when the server has discarded that version (410) is the kind
listed again, and that list also shows what was deleted meanwhile. So every change reaches the cache
once, without a periodic relist.

Which changes matter to which model is decided elsewhere (`event_handlers.py`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from faasmoe_contracts.backoff import ExponentialBackoff
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import ListWatcher
from faasmoe_operator.kube.errors import Expired, KubeApiError, NotFound, Unavailable
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL
from faasmoe_operator.kube.transport import IDLE_TIMEOUT
from faasmoe_operator.kube.types import MOEMODEL, TENANT, Kind

logger = logging.getLogger(__name__)

MANAGED_BY_SELECTOR = f"{MANAGED_BY_LABEL}={FIELD_MANAGER}"
MIN_WATCH_S = 1.0
"""A watch that ends sooner, without an event, counts as failed: it is not repeated at once."""


@dataclass(frozen=True, slots=True)
class ReflectorTiming:
    """Timing of lists and watches, in seconds.

    Attributes:
        watch_timeout_s: the server ends a watch after this time to twice this time, at random.
        idle_timeout_s: silence after which a watch is taken for dead and resumed. The API server
            sends a bookmark about every 60 s, though none before the first event of a kind.
        min_backoff_s: delay after the first failure; it doubles with each further one.
        unavailable_backoff_s: longest delay while the server does not respond, is overloaded or
            fails: its return should be noticed within seconds.
        max_backoff_s: longest delay after other failures, such as missing permissions.
        relist_interval_s: age of a list after which the end of a watch leads to a new list, which
            repairs events lost on the way.
    """

    watch_timeout_s: int = 300
    idle_timeout_s: float = 70.0
    min_backoff_s: float = 1.0
    unavailable_backoff_s: float = 5.0
    max_backoff_s: float = 30.0
    relist_interval_s: float = 1800.0


def label_selector_for(kind: Kind) -> str:
    """Return the selector of the objects to follow: those of users, only our own of other kinds."""
    return "" if kind in (MOEMODEL, TENANT) else MANAGED_BY_SELECTOR


class Reflector:
    """Lists and watches one kind.

    Args:
        api: the API server.
        cache: the cache to keep up to date.
        kind: the kind to follow.
        namespace: the namespace to follow; None for all.
        on_event: called for each watch event, with its kind.
        on_not_served: called when the API server does not serve the kind, after which `run`
            returns; None to wait for the kind.
        timing: timeouts and delays.
    """

    def __init__(
        self,
        api: ListWatcher,
        cache: ObjectCache,
        kind: Kind,
        namespace: str | None,
        *,
        on_event: Callable[[Kind], None] = lambda kind: None,
        on_not_served: Callable[[Kind], None] | None = None,
        timing: ReflectorTiming | None = None,
    ) -> None:
        self.has_synced = asyncio.Event()
        """Set after the first list, or when `run` ends."""
        self._api, self._cache = api, cache
        self._kind, self._namespace = kind, namespace
        self._label_selector = label_selector_for(kind)
        self._on_event, self._on_not_served = on_event, on_not_served
        self._timing = timing or ReflectorTiming()
        self._resource_version: str | None = None
        self._listed_at_s = -math.inf
        self._backoff = ExponentialBackoff(
            self._timing.min_backoff_s, self._timing.max_backoff_s, jitter=0.5
        )

    async def run(self) -> None:
        """Follow the kind until cancelled, or until it is not served; see `on_not_served`."""
        try:
            await self._follow()
        finally:
            self.has_synced.set()

    async def _follow(self) -> None:
        while True:
            try:
                await self._list_and_watch()
            except KubeApiError as error:
                if isinstance(error, NotFound) and self._on_not_served is not None:
                    self._on_not_served(self._kind)
                    return
                await self._recover_from(error)
            except Exception:  # a malformed object, say: this kind is late, the operator goes on
                logger.exception("%s: unexpected failure, listing again", self._kind)
                self._resource_version = None
                await asyncio.sleep(self._backoff.next_delay_s(random.random()))

    async def _list_and_watch(self) -> None:
        """List unless there is a recent version to resume from; then watch to the watch's end."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._listed_at_s >= self._timing.relist_interval_s:
            self._resource_version = None
        if self._resource_version is None:
            self._resource_version = await self._list()
            self._listed_at_s = now_s
            self.has_synced.set()
        await self._watch(self._resource_version)

    async def _list(self) -> str:
        objects, resource_version = await self._api.list(
            self._kind, self._namespace, label_selector=self._label_selector
        )
        n_deleted = self._cache.replace(
            self._kind, objects, namespace=self._namespace, resource_version=resource_version
        )
        if n_deleted:
            logger.info(
                "relist: %d %s were deleted while no watch was running", n_deleted, self._kind
            )
        return resource_version

    async def _watch(self, resource_version: str) -> None:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        events = self._api.watch(
            self._kind,
            self._namespace,
            resource_version=resource_version,
            label_selector=self._label_selector,
            timeout_s=round(self._timing.watch_timeout_s * random.uniform(1.0, 2.0)),
            idle_timeout_s=self._timing.idle_timeout_s,
        )
        async with aclosing(events):
            async for event in events:
                self._backoff.reset()
                self._on_event(self._kind)
                if event.type == "DELETED":
                    self._cache.delete(self._kind, event.object)
                elif event.type in ("ADDED", "MODIFIED"):
                    self._cache.update(self._kind, event.object)
                self._resource_version = event.object["metadata"]["resourceVersion"]
        if self._resource_version == resource_version and loop.time() - started_at < MIN_WATCH_S:
            raise Unavailable("the watch ended at once", status=0, reason="ShortWatch")

    async def _recover_from(self, error: KubeApiError) -> None:
        """Wait before the next attempt, and decide whether it must list again."""
        if isinstance(error, NotFound | Expired):
            self._resource_version = None
        if error.reason == IDLE_TIMEOUT:
            logger.info("%s: resuming the watch: %s", self._kind, error)
            return
        delay_s = self._next_delay_s(error)
        logger.warning("%s: retrying in %.1f s: %s", self._kind, delay_s, error)
        await asyncio.sleep(delay_s)

    def _next_delay_s(self, error: KubeApiError) -> float:
        """Return the delay after a failure: exponential with jitter, at least Retry-After."""
        delay_s = self._backoff.next_delay_s(random.random())
        if not isinstance(error, Unavailable):
            return delay_s
        return max(min(delay_s, self._timing.unavailable_backoff_s), error.retry_after_s or 0.0)


class Informers:
    """The reflectors of one operator: one for each kind and namespace.

    Args:
        api: the API server.
        cache: the cache to keep up to date.
        namespaces: the namespaces to follow; empty for all.
        task_group: runs the reflectors.
        on_event: called for each watch event, with its kind.
        on_not_served: called when an optional kind is not served any more.
        timing: timeouts and delays.
    """

    def __init__(
        self,
        api: ListWatcher,
        cache: ObjectCache,
        *,
        namespaces: Sequence[str],
        task_group: asyncio.TaskGroup,
        on_event: Callable[[Kind], None],
        on_not_served: Callable[[Kind], None],
        timing: ReflectorTiming | None = None,
    ) -> None:
        self._api, self._cache = api, cache
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._task_group = task_group
        self._on_event, self._on_not_served = on_event, on_not_served
        self._timing = timing
        self._reflectors: list[Reflector] = []
        self._optional_tasks: dict[Kind, list[asyncio.Task[None]]] = {}

    def start(self, kinds: Sequence[Kind]) -> None:
        """Follow kinds that every cluster serves."""
        for kind in kinds:
            self._start(kind, on_not_served=None)

    def start_optional(self, kind: Kind) -> None:
        """Follow an optional kind, as long as it is served."""
        self._optional_tasks[kind] = self._start(kind, on_not_served=self._on_not_served)

    def stop_optional(self, kind: Kind) -> None:
        """Stop following an optional kind and remove its objects from the cache."""
        for task in self._optional_tasks.pop(kind):
            task.cancel()
        self._cache.forget(kind)

    async def wait_for_cache_sync(self) -> None:
        """Wait until every kind has been listed."""
        for reflector in tuple(self._reflectors):
            await reflector.has_synced.wait()

    def _start(
        self, kind: Kind, *, on_not_served: Callable[[Kind], None] | None
    ) -> list[asyncio.Task[None]]:
        reflectors = [
            Reflector(
                self._api,
                self._cache,
                kind,
                namespace,
                on_event=self._on_event,
                on_not_served=on_not_served,
                timing=self._timing,
            )
            for namespace in self._namespaces
        ]
        self._reflectors += reflectors
        return [self._task_group.create_task(reflector.run()) for reflector in reflectors]
