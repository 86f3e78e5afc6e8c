"""Lists that fill the cache at the start, and find what the watches have missed.

A watch that was cut off for long begins with a new list, and what was deleted in between is then
told by nobody. So each kind is listed again now and then, and a minute after what makes that likely
to matter: its watch has begun anew, or we have deleted an object of it.

kopf's part: it watches, and hands every event over. It handles nothing and writes nothing.

kopf keeps no state in the objects here: there are only `on.event` handlers, so no finalizer, no
annotation and no progress is written; and it posts no events. The indices keep nothing: with them
kopf calls no handler before it has listed every kind, so the first event tells that the watches
are on, and whatever happens from then on is told.

Runs kopf: in a thread and an event loop of its own, begun anew if it ends.

kopf takes its loop for its own (when it ends, it cancels every task that it finds) and parses
whole lists at once; the control API, whose wakes are to be answered in milliseconds, is not to
share a loop with that. Events cross over one by one, into the loop that everything else lives in.

The watches of one operator: one over what every cluster serves, one for each optional kind.

An optional kind that goes takes its own watch down and no other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import kopf

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError, NotFound
from faasmoe_operator.kube.event_handlers import CacheUpdater
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL
from faasmoe_operator.kube.transport import kubeconfig_paths
from faasmoe_operator.kube.types import MOEMODEL, Kind, Object

logger = logging.getLogger(__name__)


MANAGED_BY_SELECTOR = f"{MANAGED_BY_LABEL}={FIELD_MANAGER}"
RELIST_DELAY_S = 60.0
RELIST_PERIOD_S = 1800.0
RELIST_TICK_S = 5.0


def label_selector_for(kind: Kind) -> str:
    """Return the labels of the objects of a kind that concern us: MoEModels do all."""
    return "" if kind == MOEMODEL else MANAGED_BY_SELECTOR


class Relister:
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
        on_not_served: Callable[[Kind], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._cache, self._clock = api, cache, clock
        self._on_not_served = on_not_served
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._due_at = dict.fromkeys(kinds, -float("inf"))
        self._added_kinds: set[Kind] = set()

    def add_kind(self, kind: Kind) -> None:
        """List a kind from now on; soon again, as its watch may begin after the first list."""
        self._due_at[kind] = -float("inf")
        self._added_kinds.add(kind)

    def remove_kind(self, kind: Kind) -> None:
        """List a kind no more, and forget its objects."""
        self._due_at.pop(kind, None)
        self._cache.replace(kind, (), known_uids=self._cache.known_uids(kind, None))

    async def list_all(self) -> None:
        """List everything once; raises ApiError."""
        for kind in tuple(self._due_at):
            await self._list(kind)

    async def run(self) -> None:
        """List each kind when it is due, until cancelled."""
        while True:
            await asyncio.sleep(RELIST_TICK_S)
            await self.relist_due()

    async def relist_due(self) -> None:
        """List the kinds that are due; one that is refused is due again soon."""
        for kind in [kind for kind, due in self._due_at.items() if due <= self._clock()]:
            await self._relist(kind)

    def schedule_relist(self, *kinds: Kind) -> None:
        """Have kinds listed soon, or all if none is given."""
        due_at = self._clock() + RELIST_DELAY_S
        for kind in kinds or self._due_at:
            if kind in self._due_at:
                self._due_at[kind] = min(self._due_at[kind], due_at)

    async def _relist(self, kind: Kind) -> None:
        try:
            await self._list(kind)
        except KubeApiError as error:
            logger.warning("%s: relist failed: %s", kind, error)
            if kind in self._due_at:
                self._due_at[kind] = self._clock() + RELIST_DELAY_S

    async def _list(self, kind: Kind) -> None:
        n_deleted = 0
        for namespace in self._namespaces:
            known_uids = self._cache.known_uids(kind, namespace)
            objects = await self._list_namespace(kind, namespace)
            n_deleted += self._cache.replace(kind, objects, known_uids=known_uids)
        self._due_at[kind] = self._clock() + (
            RELIST_DELAY_S if kind in self._added_kinds else RELIST_PERIOD_S
        )
        self._added_kinds.discard(kind)
        if n_deleted:
            logger.info("relist: %d %s were deleted while no watch was running", n_deleted, kind)

    async def _list_namespace(self, kind: Kind, namespace: str | None) -> list[Object]:
        try:
            return await self._api.list(kind, namespace, label_selector=label_selector_for(kind))
        except NotFound:
            self._on_not_served(kind)
            raise


ANNOTATION_PREFIX = "faasmoe.dev"
WATCH_SERVER_TIMEOUT_S = 300
WATCH_CLIENT_TIMEOUT_S = 310
WATCH_CONNECT_TIMEOUT_S = 30
WATCH_INACTIVITY_TIMEOUT_S = 70
"""The API server sends a bookmark each minute: a watch that is silent for longer is dead."""
LIST_PAGE_SIZE = 500
ERROR_BACKOFF_DELAYS_S = (1, 1, 2, 3, *[5] * 12)
"""An API server that comes back is to be seen within seconds; after a minute kopf begins anew."""

WatchEventCallback = Callable[[Kind, str | None, Object], None]
"""Takes an event: the object's kind, the event's type (None while listing), and the object."""


def build_registry(kinds: Sequence[Kind], on_event: WatchEventCallback) -> kopf.OperatorRegistry:
    """Return handlers that hand every event of these kinds over."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(_login)
    for kind in kinds:
        _register_handlers(registry, kind, on_event)
    return registry


def build_settings(kinds: Sequence[Kind]) -> kopf.OperatorSettings:
    """Return kopf's settings."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # neither CRDs nor namespaces are to be listed
    settings.peering.standalone = True
    settings.networking.error_backoffs = ERROR_BACKOFF_DELAYS_S
    settings.watching.server_timeout = WATCH_SERVER_TIMEOUT_S
    settings.watching.client_timeout = WATCH_CLIENT_TIMEOUT_S
    settings.watching.connect_timeout = WATCH_CONNECT_TIMEOUT_S
    settings.watching.inactivity_timeout = WATCH_INACTIVITY_TIMEOUT_S
    settings.watching.chunk_size = LIST_PAGE_SIZE
    settings.persistence.finalizer = f"{ANNOTATION_PREFIX}/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(
        prefix=ANNOTATION_PREFIX, v1=False
    )
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix=ANNOTATION_PREFIX
    )
    for kind in kinds:
        if selector := label_selector_for(kind):
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = selector
    return settings


def _register_handlers(
    registry: kopf.OperatorRegistry, kind: Kind, on_event: WatchEventCallback
) -> None:
    async def forward(event: kopf.RawEvent, **_: Any) -> None:
        on_event(kind, event["type"], dict(event["object"]))

    async def keep_no_index(**_: Any) -> None:
        return None

    kopf.index(kind.group, kind.version, kind.plural, id=f"list-{kind.plural}", registry=registry)(
        keep_no_index
    )
    kopf.on.event(
        kind.group, kind.version, kind.plural, id=f"watch-{kind.plural}", registry=registry
    )(forward)


async def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Log kopf in as the client is: by the pod's service account, or by KUBECONFIG."""
    if kubeconfig_paths() is None:
        return kopf.login_with_service_account(**kwargs)
    return kopf.login_with_kubeconfig(**kwargs)


RESTART_DELAY_S = 5.0
STOP_TIMEOUT_S = 10.0


class KopfThread:
    """Watches objects, until cancelled.

    Args:
        kinds: what to watch.
        namespaces: where; empty for everywhere.
        deliver: takes each event, in the loop that `run` is called in.
        interrupted: called when the watches have ended, before they begin anew.
        restart_s: pause before they do.
    """

    def __init__(
        self,
        *,
        kinds: Sequence[Kind],
        namespaces: Sequence[str],
        on_event: WatchEventCallback,
        on_restart: Callable[[], None],
        restart_delay_s: float = RESTART_DELAY_S,
    ) -> None:
        self._kinds, self._namespaces = tuple(kinds), tuple(namespaces)
        self._on_event, self._on_restart = on_event, on_restart
        self._restart_delay_s = restart_delay_s

    async def run(self) -> None:
        """Watch until cancelled; a kopf that fails is started again after a pause."""
        while True:
            await self._run_once()
            logger.error("watches ended; restarting in %g s", self._restart_delay_s)
            await asyncio.sleep(self._restart_delay_s)
            self._on_restart()

    async def _run_once(self) -> None:
        loop, stop, finished = asyncio.get_running_loop(), threading.Event(), asyncio.Event()

        def run_thread() -> None:
            try:
                asyncio.run(self._run_kopf(loop, stop))
            except Exception:
                logger.exception("kopf failed")
            finally:
                _call_soon(loop, finished.set)

        threading.Thread(target=run_thread, name="kopf", daemon=True).start()
        try:
            await finished.wait()
        finally:
            stop.set()
            await asyncio.wait_for(finished.wait(), STOP_TIMEOUT_S)

    async def _run_kopf(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        def forward(kind: Kind, type_: str | None, obj: Object) -> None:
            _call_soon(loop, lambda: self._on_event(kind, type_, obj))

        try:
            await kopf.operator(
                registry=build_registry(self._kinds, forward),
                settings=build_settings(self._kinds),
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
                standalone=True,
                stop_flag=stop,
            )
        finally:
            stop.set()  # kopf waits for it in a thread that its loop waits for


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Have a function called in a loop, unless that has ended."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        logger.debug("event received after shutdown")


class Informers:
    """Watches and lists kinds.

    Args:
        namespaces: where; empty for everywhere.
        feed: takes the events.
        resync: lists what the watches may have missed.
        group: the tasks of the operator.
    """

    def __init__(
        self,
        namespaces: Sequence[str],
        updater: CacheUpdater,
        relister: Relister,
        task_group: asyncio.TaskGroup,
    ) -> None:
        self._namespaces = namespaces
        self._updater, self._relister, self._task_group = updater, relister, task_group
        self._optional_tasks: dict[Kind, asyncio.Task[None]] = {}

    def start(self, kinds: Sequence[Kind]) -> None:
        """Watch kinds that are there as long as the operator is."""
        self._task_group.create_task(self._new_kopf_thread(kinds).run())

    def start_optional(self, kind: Kind) -> None:
        """Begin to watch and to list a kind that has come."""
        self._relister.add_kind(kind)
        self._optional_tasks[kind] = self._task_group.create_task(self._run_optional(kind))

    def stop_optional(self, kind: Kind) -> None:
        """Watch and list a kind no more, and forget its objects."""
        self._relister.remove_kind(kind)
        self._optional_tasks.pop(kind).cancel()

    async def _run_optional(self, kind: Kind) -> None:
        await self._updater.has_synced.wait()  # the first event is to tell that the others are on
        with suppress(TimeoutError):  # its thread does not end: it holds nothing up
            await self._new_kopf_thread((kind,)).run()

    def _new_kopf_thread(self, kinds: Sequence[Kind]) -> KopfThread:
        return KopfThread(
            kinds=kinds,
            namespaces=self._namespaces,
            on_event=self._updater.on_event,
            on_restart=lambda: self._relister.schedule_relist(*kinds),
        )
