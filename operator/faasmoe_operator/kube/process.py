"""The operator process: everything put together, until SIGTERM.

It may be killed at any moment and started again: what there is, is read back.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import TypeVar

from faasmoe_operator.control.api import models_app, models_metrics
from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.config import OperatorConfig
from faasmoe_operator.kube.connection import load_connection
from faasmoe_operator.kube.core import Grounds
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.events import EventWriter
from faasmoe_operator.kube.kinds import MOEMODEL, WATCHED, Kind
from faasmoe_operator.kube.leadership import Election, leading
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.models import ModelCores
from faasmoe_operator.kube.optional_apis import OptionalApis
from faasmoe_operator.kube.readiness import Readiness
from faasmoe_operator.kube.reconciler import Reconciler
from faasmoe_operator.kube.resync import Resync
from faasmoe_operator.kube.root_key import root_key
from faasmoe_operator.kube.server import Front, listen
from faasmoe_operator.kube.surroundings import Surroundings
from faasmoe_operator.kube.transport import Transport
from faasmoe_operator.kube.triggers import Feed, Triggers
from faasmoe_operator.kube.watches import Watches
from faasmoe_operator.kube.workers import Workers

logger = logging.getLogger(__name__)

COUNTS_DELAY_S = 0.5
RETRY_S = 5.0
LISTING_S = 3.0
"""For the watches to tell of what there is; with nothing there, nothing is told."""

Answer = TypeVar("Answer")


async def serve(config: OperatorConfig) -> None:
    """Look after MoEModels until SIGTERM or SIGINT; raises FaasmoeError."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
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
        self._deleted: Callable[[Kind], None] = lambda kind: None

    async def run(self) -> None:
        """Look after MoEModels until cancelled; raises FaasmoeError."""
        transport = Transport(await load_connection(), count=self._count)
        async with KubeClient(transport) as api:
            workers = Workers(metrics=self._metrics, n_workers=self._config.workers)
            cores = ModelCores(
                Grounds(api, self._cache),
                on_change=lambda key: workers.add(key, delay_s=COUNTS_DELAY_S),
            )
            async with self._listening(cores), self._leading(api):
                try:
                    await self._look_after(api, cores, workers)
                finally:
                    self._readiness.waits_for = "nothing: it ends"
                    await cores.end()

    async def _look_after(self, api: KubeClient, cores: ModelCores, workers: Workers) -> None:
        """Visit MoEModels until cancelled."""
        config = self._config
        root = await self._insist(
            lambda: root_key(api, namespace=config.namespace, name=config.root_key_secret),
            what=f"the root key in Secret {config.namespace}/{config.root_key_secret}",
        )
        await self._insist(lambda: check_crd(api), what=f"the CRD of {MOEMODEL}")
        apis = OptionalApis(api, self._cache, visit=workers.add)
        reconciler = Reconciler(
            api,
            self._cache,
            cores,
            Surroundings(config.images, config.control, root, served=apis.versions),
            events=EventWriter(api, instance=config.identity),
        )
        resync = Resync(
            api, self._cache, kinds=WATCHED, namespaces=config.watch_namespaces, gone=apis.lose
        )
        self._deleted = resync.doubt
        feed = Feed(self._cache, resync, self._metrics)
        self._cache.subscribe(Triggers(workers).take)
        async with asyncio.TaskGroup() as group:
            watches = Watches(config.watch_namespaces, feed, resync, group)
            watches.begin(WATCHED)
            await self._insist(lambda: apis.begin(watches), what="what the cluster serves")
            await self._fill(feed, resync)
            group.create_task(resync.run())
            group.create_task(apis.run())
            group.create_task(workers.run(reconciler.reconcile))

    async def _fill(self, feed: Feed, resync: Resync) -> None:
        """Fill the cache after the watches are on, so that nothing in it can go unnoticed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(feed.has_begun.wait(), LISTING_S)
        is_empty = not feed.has_begun.is_set()
        await self._insist(resync.fill, what="lists of all objects")
        self._readiness.waits_for = ""
        if is_empty:  # there is nothing to look after before the first event
            await feed.has_begun.wait()
            await self._insist(resync.fill, what="lists of all objects")
            self._readiness.waits_for = ""
        logger.info("%d MoEModels are looked after", len(self._cache.all(MOEMODEL)))

    @asynccontextmanager
    async def _listening(self, cores: ModelCores) -> AsyncIterator[None]:
        """Serve HTTP, from the beginning: health is asked for before anything is known."""
        front = Front(self._readiness, lambda: self._metrics_text(cores))
        app = models_app(cores.find, others=front.routes())
        runner = await listen(app, host=self._config.host, port=self._config.control.port)
        try:
            yield
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def _leading(self, api: KubeClient) -> AsyncIterator[None]:
        """Wait for this operator's turn, if there may be several."""
        config = self._config
        election: AbstractAsyncContextManager[None] = nullcontext()
        if config.leader_election:
            self._readiness.waits_for = "its turn: another operator leads"
            election = leading(Election(api, namespace=config.namespace, identity=config.identity))
        async with election:
            self._metrics.leading.set(1)
            yield

    async def _insist(self, ask: Callable[[], Awaitable[Answer]], *, what: str) -> Answer:
        """Ask until there is an answer; an operator that ends would only be started again."""
        while True:
            self._readiness.waits_for = what
            try:
                return await ask()
            except (ApiError, NotServed) as error:
                logger.warning("waits for %s: %s", what, error)
            await asyncio.sleep(RETRY_S)

    def _count(self, verb: str, kind: Kind, status: int) -> None:
        self._metrics.count_request(verb, kind, status)
        if verb == "delete":
            self._deleted(kind)

    def _metrics_text(self, cores: ModelCores) -> bytes:
        self._metrics.count_models(self._cache.all(MOEMODEL))
        return self._metrics.text() + models_metrics(cores.controllers())


class NotServed(FaasmoeError):
    """The cluster does not serve what the operator is for."""


async def check_crd(api: KubeClient) -> None:
    """Raise NotServed if the CRD is not installed, or ApiError."""
    if not await api.serves(MOEMODEL):
        raise NotServed(f"{MOEMODEL} is not served: apply the CRD, crds/ has it")
