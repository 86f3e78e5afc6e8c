"""One model's control core in the operator: kept running, made anew when its model changes.

Whatever goes wrong in it stays in it: it is logged, told as trouble, and the core begins anew after
a while. Each life of a core reads back what the sandboxes hold, as a new process would, so that
none that is healthy is dropped, and routers follow it by another epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.ledger import Ledger
from faasmoe_operator.control.ledger_keeper import LedgerKeeper
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.timing import Timing
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.blueprint import Blueprint
from faasmoe_operator.kube.cache import ObjectCache, PodSource
from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.ledger import LedgerMap
from faasmoe_operator.kube.manifests.sandbox import PORT
from faasmoe_operator.kube.pod_labels import PodLabels
from faasmoe_operator.kube.popularity import PopularityMap
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.platforms.kubernetes import KubernetesPlatform
from faasmoe_operator.platforms.kubernetes import Timing as PodTiming

logger = logging.getLogger(__name__)

TELL_INTERVAL_S = 0.5
RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
SOUND_AFTER_S = 120.0
POD_TIMING = Timing(start_deadline_s=600.0, save_interval_s=300.0, accounts_interval_s=60.0)
"""A pod's image may have to be pulled first, and etcd is not to be written to all the time."""


@dataclass(frozen=True, slots=True)
class Grounds:
    """What all cores stand on.

    Attributes:
        api: the Kubernetes API.
        cache: what it has told.
        timing: periods and deadlines of control cores.
        pod_timing: those of the platform.
        port: where sandboxes listen.
        clock: the time of day.
    """

    api: KubeApi
    cache: ObjectCache
    timing: Timing = POD_TIMING
    pod_timing: PodTiming = field(default_factory=PodTiming)
    port: int = PORT
    clock: Callable[[], float] = time.time


class ModelCore:
    """The control core of one MoEModel; `start`, and `end` when it is not wanted any more.

    Args:
        blueprint: what to start from.
        grounds: what all cores stand on.
        on_change: called when what it counts has changed.
    """

    def __init__(
        self, blueprint: Blueprint, grounds: Grounds, *, on_change: Callable[[], None]
    ) -> None:
        self.blueprint = blueprint
        self.controller: Controller | None = None
        """The controller, while it has read everything back."""
        self._grounds = grounds
        self._on_change = on_change
        self._platform: KubernetesPlatform | None = None
        self._popularity: Mapping[str, float] | None = None
        self._ledger: Ledger | None = None
        self._replaced = asyncio.Event()
        self._fault = ""
        self._told: CoreCounts | None = None

    def start(self) -> None:
        """Begin to run."""
        self._task = asyncio.create_task(self._supervise())

    def replace(self, blueprint: Blueprint) -> None:
        """Begin anew from another blueprint."""
        self.blueprint = blueprint
        self._replaced.set()

    async def end(self) -> None:
        """Stop; the sandboxes go on."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def counts(self) -> CoreCounts | None:
        """Return what there is, or was while that is read back; None before it is known."""
        controller, n_functions = self.controller, len(self.blueprint.model.functions)
        if controller is None:
            return CoreCounts(n_functions, trouble=self._fault) if self._fault else self._told
        ready, states = controller.fleet.ready(), controller.fleet.states()
        loss = self._platform.loss if self._platform is not None else ""
        return CoreCounts(
            functions=n_functions,
            active=len(ready),
            replicas=ready.total(),
            sandboxes=states.total(),
            ready=states[SandboxState.READY],
            generic=controller.fleet.n_generic(),
            tenant_keys=controller.reports.tenants(controller.clock()),
            trouble=controller.trouble or loss,
        )

    async def _supervise(self) -> None:
        n_failures = 0
        while True:
            self._replaced.clear()
            begun_s = time.monotonic()
            error = await self._first_of(self._live(self.blueprint))
            if error is None:
                continue
            n_failures = 1 if time.monotonic() - begun_s > SOUND_AFTER_S else n_failures + 1
            delay_s = RETRY_DELAYS_S[min(n_failures, len(RETRY_DELAYS_S)) - 1]
            self._fault = f"the model's control failed and begins anew: {_in_words(error)}"
            logger.error("%s: %s", self.blueprint.model.name, self._fault, exc_info=error)
            self._tell()
            await self._first_of(asyncio.sleep(delay_s))

    async def _first_of(self, work: Coroutine[Any, Any, None]) -> BaseException | None:
        """Do some work until it ends or the core is replaced; return what it failed with."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._until_replaced())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        error = results[0]
        is_failure = isinstance(error, BaseException)
        return error if is_failure and not isinstance(error, asyncio.CancelledError) else None

    async def _until_replaced(self) -> None:
        await self._replaced.wait()

    async def _live(self, blueprint: Blueprint) -> None:
        """Run from one blueprint until cancelled."""
        grounds = self._grounds
        pods = PodSource(grounds.cache, blueprint.uid)
        popularity = PopularityMap(
            grounds.api,
            grounds.cache,
            blueprint.ctx,
            model_digest=blueprint.model.store.model_digest,
            clock=grounds.clock,
        )
        accounts = LedgerMap(grounds.api, grounds.cache, blueprint.ctx, clock=grounds.clock)
        found = accounts.read()
        self._ledger = found if self._ledger is None else self._ledger
        async with (
            KubernetesPlatform(
                grounds.api, pods, timing=grounds.pod_timing, port=grounds.port
            ) as platform,
            SandboxClient(token=blueprint.token) as client,
            asyncio.TaskGroup() as group,
        ):
            controller = Controller(
                blueprint.model,
                platform,
                client,
                timing=grounds.timing,
                popularity=popularity.read() if self._popularity is None else self._popularity,
                ledger=self._ledger,
            )
            group.create_task(platform.run())
            await controller.start()
            self.controller, self._platform, self._fault = controller, platform, ""
            try:
                labels = PodLabels(grounds.api, pods, controller, namespace=blueprint.ctx.namespace)
                group.create_task(controller.run())
                group.create_task(labels.run())
                group.create_task(
                    popularity.keep(controller, interval_s=grounds.timing.save_interval_s)
                )
                keeper = LedgerKeeper(
                    controller.ledger,
                    controller.ledger_changed,
                    accounts.write,
                    interval_s=grounds.timing.accounts_interval_s,
                )
                group.create_task(keeper.run())
                await self._tell_changes(controller)
            finally:
                self._popularity = controller.records.popularity(controller.clock())
                self.controller = self._platform = None

    async def _tell_changes(self, controller: Controller) -> None:
        while True:
            revision = controller.revision
            self._tell()
            await controller.beyond(revision)
            await asyncio.sleep(TELL_INTERVAL_S)

    def _tell(self) -> None:
        counts = self.counts()
        if counts != self._told:
            self._told = counts
            self._on_change()


def _in_words(error: BaseException) -> str:
    """Return what went wrong; of several faults the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    with suppress(Exception):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__
