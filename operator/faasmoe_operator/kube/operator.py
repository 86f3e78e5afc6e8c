"""The operator process: composition root, startup order, shutdown.

Startup: serve health checks, win the leader election, load the root key, wait for the CRD, start
the informers, and reconcile once the cache has synced. The process keeps no state that it cannot
read back from the cluster, so it may be killed at any moment. Only one of several replicas
reconciles.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from aiohttp import web

from faasmoe_contracts.tls import TlsError, TlsFolder
from faasmoe_operator.control.api import LivePage, make_models_app, render_models_metrics
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.api_discovery import OptionalApis
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.config import LogFormat, OperatorConfig
from faasmoe_operator.kube.context import (
    OperatorContext,
    derive_front_token,
    derive_gateway_token,
    load_root_key,
)
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.event_handlers import ModelEnqueuer
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.informer import Informers
from faasmoe_operator.kube.leader_election import LeaderElector, hold_leadership
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.model_runtime import RuntimeDependencies, RuntimeManager
from faasmoe_operator.kube.reconciler import Reconciler
from faasmoe_operator.kube.server import (
    HealthRoutes,
    Readiness,
    require_models_certificate,
    start_server,
)
from faasmoe_operator.kube.tenants.controller import GatewayTokens, TenantController
from faasmoe_operator.kube.tenants.gateway_objects import GatewayObjects
from faasmoe_operator.kube.tenants.router_demand import RouterDemandScaler
from faasmoe_operator.kube.tls_secrets import TlsSecrets
from faasmoe_operator.kube.transport import KubeTransport, load_client_configuration
from faasmoe_operator.kube.types import MOEMODEL, POD_RESIZE, TENANT, WATCHED_KINDS, ModelKey
from faasmoe_operator.kube.work_queue import WorkerPool
from faasmoe_tracing import create_tracer

logger = logging.getLogger(__name__)

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
STATUS_DEBOUNCE_S = 0.5
LOOPBACK = "127.0.0.1"
RETRY_DELAY_S = 5.0

Result = TypeVar("Result")


async def run_operator(config: OperatorConfig) -> None:
    """Reconcile MoEModels until SIGTERM or SIGINT; raises FaasmoeError."""
    task = asyncio.current_task()
    assert task is not None
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, task.cancel)
    try:
        await Operator(config).run()
    except asyncio.CancelledError:
        task.uncancel()


class Operator:
    """One replica of the operator.

    Args:
        config: its settings.
    """

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        self._metrics = OperatorMetrics()
        self._readiness = Readiness()
        self._cache = ObjectCache()
        self._tracer = create_tracer(os.environ, service="faasmoe-operator")

    async def run(self) -> None:
        """Reconcile MoEModels until cancelled; raises FaasmoeError."""
        kube_transport = KubeTransport(
            await load_client_configuration(), on_request=self._metrics.count_request
        )
        async with KubeClient(kube_transport) as api, AsyncExitStack() as folders:
            tls = await self._open_tls(api, folders)
            workers = WorkerPool(metrics=self._metrics, n_workers=self._config.workers)
            runtimes = RuntimeManager(
                RuntimeDependencies(api, self._cache, tracer=self._tracer, tls=tls.folder),
                on_change=lambda key: workers.add(key, delay_s=STATUS_DEBOUNCE_S),
            )
            async with self._serve_http(runtimes, tls.folder), self._lead(api):
                try:
                    await self._reconcile_models(api, runtimes, workers, tls)
                finally:
                    self._readiness.waiting_for = "nothing: shutting down"
                    await runtimes.stop()
                    await asyncio.to_thread(self._tracer.close)

    async def _reconcile_models(
        self, api: KubeClient, runtimes: RuntimeManager, workers: WorkerPool, tls: _OperatorTls
    ) -> None:
        """Start the informers and the workers, and run them until cancelled."""
        config = self._config
        root = await self._load_root_key(api)
        await self._retry_until_success(
            lambda: check_crd(api), description=f"the CRD of {MOEMODEL}"
        )
        can_resize = await self._retry_until_success(
            lambda: api.is_served(POD_RESIZE), description=f"discovery of {POD_RESIZE}"
        )
        apis = OptionalApis(api, self._cache, enqueue=workers.add)
        links = GatewayLinks()
        tenants = self._make_tenant_controller(api, root, links, tls.folder, enqueue=workers.add)
        demand = RouterDemandScaler(
            self._cache, links, enqueue=lambda key: workers.add(key, urgent=True)
        )
        has_gateways = config.gateway_port is not None
        context = OperatorContext(
            config.images,
            config.control,
            root,
            served_apis=apis.served_versions,
            user_id=config.run_as_user,
            can_resize=can_resize,
            gateways=config.gateways,
            router_tenants=tenants.router_tenants,
            scaled_routers=demand.desired if has_gateways else lambda _: None,
            tls_secret=config.models_tls_secret,
        )
        events = EventRecorder(api, instance=config.identity)
        reconciler = Reconciler(
            api, self._cache, runtimes, context, events=events, tracer=self._tracer
        )
        self._cache.add_event_handler(ModelEnqueuer(workers).on_change)
        async with AsyncExitStack() as servers, asyncio.TaskGroup() as group:
            await self._start_informers(api, apis, group)
            await self._retry_until_success(tenants.start, description="the Tenants' keys")
            if (port := config.gateway_port) is not None:
                await servers.enter_async_context(tenants.listening(config.host, port))
            self._readiness.waiting_for = ""
            logger.info("cache synced: %d MoEModels", len(self._cache.list_all(MOEMODEL)))
            group.create_task(apis.run())
            group.create_task(tenants.run())
            if tls.secrets is not None:
                group.create_task(tls.secrets.run())
            if has_gateways:
                group.create_task(demand.run())
            group.create_task(workers.run(reconciler.reconcile))

    async def _load_root_key(self, api: KubeClient) -> bytes:
        namespace, name = self._config.namespace, self._config.root_key_secret
        return await self._retry_until_success(
            lambda: load_root_key(api, namespace=namespace, name=name),
            description=f"the root key in Secret {namespace}/{name}",
        )

    async def _open_tls(self, api: KubeClient, folders: AsyncExitStack) -> _OperatorTls:
        """Return the operator's certificate, if it has one; raises TlsFolderError.

        Args:
            api: the API server, for the root key that certificates follow from.
            folders: deletes the folder of a certificate that the operator has issued.
        """
        config = self._config
        if not config.tls:
            return _OperatorTls(None, None)
        path, secrets = config.tls_folder, None
        if path is None:
            root_key = await self._load_root_key(api)
            path = Path(folders.enter_context(TemporaryDirectory(prefix="faasmoe-tls-")))
            secrets = TlsSecrets(
                api,
                self._cache,
                root_key,
                folder=path,
                namespace=config.namespace,
                gateway_secret=config.gateway_tls_secret,
            )
            secrets.write_folder()
        try:
            return _OperatorTls(TlsFolder(path), secrets)
        except TlsError as error:
            raise TlsFolderError(f"FAASMOE_OPERATOR_TLS_FOLDER: {error}") from error

    async def _start_informers(
        self, api: KubeClient, apis: OptionalApis, group: asyncio.TaskGroup
    ) -> None:
        """Follow every kind that the cluster serves; return once the cache has synced."""
        informers = Informers(
            api,
            self._cache,
            namespaces=self._config.watch_namespaces,
            task_group=group,
            on_event=self._metrics.count_watch_event,
            on_not_served=apis.mark_not_served,
        )
        informers.start(WATCHED_KINDS)
        has_tenants = await self._retry_until_success(
            lambda: api.is_served(TENANT), description=f"discovery of {TENANT}"
        )
        if has_tenants:
            informers.start((TENANT,))
        else:
            logger.warning(
                "%s is not served: Tenants are ignored until the CRD is installed "
                "(kubectl apply --server-side -f crds/) and the operator restarted",
                TENANT,
            )
        await self._retry_until_success(
            lambda: apis.start(informers), description="discovery of the optional APIs"
        )
        self._readiness.waiting_for = "the first list of every kind"
        await informers.wait_for_cache_sync()

    def _make_tenant_controller(
        self,
        api: KubeClient,
        root: bytes,
        links: GatewayLinks,
        tls: TlsFolder | None,
        *,
        enqueue: Callable[[ModelKey], None],
    ) -> TenantController:
        config = self._config
        tokens = None
        if config.gateway_port is not None:
            tokens = GatewayTokens(
                derive_gateway_token(root), router=partial(derive_front_token, root)
            )
        return TenantController(
            api,
            self._cache,
            GatewayObjects(api, namespace=config.namespace, name=config.gateway_secret),
            tokens,
            links=links,
            events=EventRecorder(api, instance=config.identity),
            enqueue=enqueue,
            tls=tls,
        )

    @asynccontextmanager
    async def _serve_http(
        self, runtimes: RuntimeManager, tls: TlsFolder | None
    ) -> AsyncIterator[None]:
        """Serve control API, health checks, metrics and live page, before the cache has synced.

        Only what routers call has TLS: metrics have a port of their own, the page is on loopback.
        """
        config = self._config
        health = HealthRoutes(self._readiness, lambda: self._metrics_text(runtimes))
        routes = health.routes()
        async with AsyncExitStack() as servers:

            async def serve(
                app: web.Application, host: str, port: int, tls: TlsFolder | None = None
            ) -> None:
                runner = await start_server(app, host=host, port=port, tls=tls)
                servers.push_async_callback(runner.cleanup)

            if config.metrics_port is None:
                routes += health.metrics_routes()
            else:
                metrics_app = web.Application()
                metrics_app.add_routes(health.metrics_routes())
                await serve(metrics_app, config.host, config.metrics_port)
            app = make_models_app(runtimes.find_controller, extra_routes=routes)
            if tls is not None:
                app.middlewares.insert(0, require_models_certificate)
            await serve(app, config.host, config.control.port, tls)
            if config.page_port is not None:
                page = LivePage(lambda: [(str(key), c) for key, c in runtimes.controllers()])
                await serve(page.make_app(), LOOPBACK, config.page_port)
            yield

    @asynccontextmanager
    async def _lead(self, api: KubeClient) -> AsyncIterator[None]:
        """Wait for leadership, if leader election is enabled, and hold it."""
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
        """Call until it succeeds, since exiting would only restart the process.

        Args:
            call: the call; KubeApiError and CrdNotServed are retried.
            description: what /readyz and the log say the operator waits for.
        """
        while True:
            self._readiness.waiting_for = description
            try:
                return await call()
            except (KubeApiError, CrdNotServed) as error:
                logger.warning("waiting for %s: %s", description, error)
            await asyncio.sleep(RETRY_DELAY_S)

    def _metrics_text(self, runtimes: RuntimeManager) -> bytes:
        self._metrics.set_models(self._cache.list_all(MOEMODEL))
        return self._metrics.text() + render_models_metrics(runtimes.controllers())


@dataclass(frozen=True, slots=True)
class _OperatorTls:
    """The operator's part in TLS.

    Attributes:
        folder: its own certificate; None without TLS.
        secrets: writes those that it issues; None if it issues none.
    """

    folder: TlsFolder | None
    secrets: TlsSecrets | None


class TlsFolderError(FaasmoeError):
    """The operator's TLS folder is not usable."""


class CrdNotServed(FaasmoeError):
    """The CRD of MoEModel is not installed."""


async def check_crd(api: KubeClient) -> None:
    """Raise CrdNotServed if the CRD of MoEModel is not installed; may raise KubeApiError."""
    if not await api.is_served(MOEMODEL):
        raise CrdNotServed(
            f"{MOEMODEL} is not served: install the CRD (kubectl apply --server-side -f crds/)"
        )


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
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
    """Log to standard error, one line for each record, as text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
