"""How the operator logs: one line for each record, as text or as JSON, on standard error.

The operator process: everything put together, until SIGTERM.

It may be killed at any moment and started again: what there is, is read back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import TypeVar

from faasmoe_operator.control.api import make_models_app, render_models_metrics
from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.api_discovery import OptionalApis
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.config import LogFormat, OperatorConfig
from faasmoe_operator.kube.context import OperatorContext, load_root_key
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.event_handlers import CacheUpdater, ModelEnqueuer
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.informer import Informers, Relister
from faasmoe_operator.kube.leader_election import LeaderElector, hold_leadership
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.model_runtime import RuntimeDependencies, RuntimeManager
from faasmoe_operator.kube.reconciler import Reconciler
from faasmoe_operator.kube.server import HealthRoutes, Readiness, start_server
from faasmoe_operator.kube.transport import KubeTransport, load_client_configuration
from faasmoe_operator.kube.types import MOEMODEL, WATCHED_KINDS, Kind
from faasmoe_operator.kube.work_queue import WorkerPool

logger = logging.getLogger(__name__)


TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOGGER_LEVELS = {
    "kopf": logging.WARNING,  # tells of every event
    "kopf._core.reactor.running": logging.ERROR,  # warns that it is not in the main thread
}


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(format_: LogFormat, level: str) -> None:
    """Set logging up for this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name, minimum in LOGGER_LEVELS.items():
        logging.getLogger(name).setLevel(max(minimum, logging.getLogger().level))


STATUS_DEBOUNCE_S = 0.5
RETRY_DELAY_S = 5.0
INITIAL_SYNC_TIMEOUT_S = 3.0
"""For the watches to tell of what there is; with nothing there, nothing is told."""

Result = TypeVar("Result")


async def run_operator(config: OperatorConfig) -> None:
    """Look after MoEModels until SIGTERM or SIGINT; raises FaasmoeError."""
    task = asyncio.current_task()
    assert task is not None
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, task.cancel)
    try:
        await Operator(config).run()
    except asyncio.CancelledError:
        task.uncancel()


class Operator:
    """One operator.

    Args:
        config: its settings.
    """

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        self._metrics = OperatorMetrics()
        self._readiness = Readiness()
        self._cache = ObjectCache()
        self._on_delete: Callable[[Kind], None] = lambda kind: None

    async def run(self) -> None:
        """Look after MoEModels until cancelled; raises FaasmoeError."""
        kube_transport = KubeTransport(
            await load_client_configuration(), on_request=self._on_request
        )
        async with KubeClient(kube_transport) as api:
            workers = WorkerPool(metrics=self._metrics, n_workers=self._config.workers)
            runtimes = RuntimeManager(
                RuntimeDependencies(api, self._cache),
                on_change=lambda key: workers.add(key, delay_s=STATUS_DEBOUNCE_S),
            )
            async with self._serve_http(runtimes), self._lead(api):
                try:
                    await self._reconcile_models(api, runtimes, workers)
                finally:
                    self._readiness.waiting_for = "nothing: shutting down"
                    await runtimes.stop()

    async def _reconcile_models(
        self, api: KubeClient, runtimes: RuntimeManager, workers: WorkerPool
    ) -> None:
        """Visit MoEModels until cancelled."""
        config = self._config
        root = await self._retry_until_success(
            lambda: load_root_key(api, namespace=config.namespace, name=config.root_key_secret),
            description=f"the root key in Secret {config.namespace}/{config.root_key_secret}",
        )
        await self._retry_until_success(
            lambda: check_crd(api), description=f"the CRD of {MOEMODEL}"
        )
        apis = OptionalApis(api, self._cache, enqueue=workers.add)
        reconciler = Reconciler(
            api,
            self._cache,
            runtimes,
            OperatorContext(config.images, config.control, root, served_apis=apis.served_versions),
            events=EventRecorder(api, instance=config.identity),
        )
        relister = Relister(
            api,
            self._cache,
            kinds=WATCHED_KINDS,
            namespaces=config.watch_namespaces,
            on_not_served=apis.mark_not_served,
        )
        self._on_delete = relister.schedule_relist
        updater = CacheUpdater(self._cache, relister, self._metrics)
        self._cache.add_event_handler(ModelEnqueuer(workers).on_change)
        async with asyncio.TaskGroup() as group:
            informers = Informers(config.watch_namespaces, updater, relister, group)
            informers.start(WATCHED_KINDS)
            await self._retry_until_success(
                lambda: apis.start(informers), description="what the cluster serves"
            )
            await self._wait_for_cache_sync(updater, relister)
            group.create_task(relister.run())
            group.create_task(apis.run())
            group.create_task(workers.run(reconciler.reconcile))

    async def _wait_for_cache_sync(self, updater: CacheUpdater, relister: Relister) -> None:
        """Fill the cache after the watches are on, so that nothing in it can go unnoticed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(updater.has_synced.wait(), INITIAL_SYNC_TIMEOUT_S)
        is_empty = not updater.has_synced.is_set()
        await self._retry_until_success(relister.list_all, description="lists of all objects")
        self._readiness.waiting_for = ""
        if is_empty:  # there is nothing to look after before the first event
            await updater.has_synced.wait()
            await self._retry_until_success(relister.list_all, description="lists of all objects")
            self._readiness.waiting_for = ""
        logger.info("cache synced: %d MoEModels", len(self._cache.list_all(MOEMODEL)))

    @asynccontextmanager
    async def _serve_http(self, runtimes: RuntimeManager) -> AsyncIterator[None]:
        """Serve HTTP, from the beginning: health is asked for before anything is known."""
        health = HealthRoutes(self._readiness, lambda: self._metrics_text(runtimes))
        app = make_models_app(runtimes.find_controller, extra_routes=health.routes())
        runner = await start_server(app, host=self._config.host, port=self._config.control.port)
        try:
            yield
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def _lead(self, api: KubeClient) -> AsyncIterator[None]:
        """Wait for this operator's turn, if there may be several."""
        config = self._config
        election: AbstractAsyncContextManager[None] = nullcontext()
        if config.leader_election:
            self._readiness.waiting_for = "leader election: another operator is the leader"
            election = hold_leadership(
                LeaderElector(api, namespace=config.namespace, identity=config.identity)
            )
        async with election:
            self._metrics.leader.set(1)
            yield

    async def _retry_until_success(
        self, call: Callable[[], Awaitable[Result]], *, description: str
    ) -> Result:
        """Ask until there is an answer; an operator that ends would only be started again."""
        while True:
            self._readiness.waiting_for = description
            try:
                return await call()
            except (KubeApiError, CrdNotServed) as error:
                logger.warning("waiting for %s: %s", description, error)
            await asyncio.sleep(RETRY_DELAY_S)

    def _on_request(self, verb: str, kind: Kind, status: int) -> None:
        self._metrics.count_request(verb, kind, status)
        if verb == "delete":
            self._on_delete(kind)

    def _metrics_text(self, runtimes: RuntimeManager) -> bytes:
        self._metrics.set_models(self._cache.list_all(MOEMODEL))
        return self._metrics.text() + render_models_metrics(runtimes.controllers())


class CrdNotServed(FaasmoeError):
    """The cluster does not serve what the operator is for."""


async def check_crd(api: KubeClient) -> None:
    """Raise NotServed if the CRD is not installed, or ApiError."""
    if not await api.is_served(MOEMODEL):
        raise CrdNotServed(
            f"{MOEMODEL} is not served: install the CRD (kubectl apply --server-side -f crds/)"
        )
