"""The control process of all models of one machine: their controllers over one pool of sandboxes.

Models are isolated from each other: a controller that fails is logged and started again, as a new
epoch that reads its sandboxes back, while the others go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Never

from faasmoe_contracts.backoff import Backoff
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_contracts.store import Store
from faasmoe_operator.control.api import LivePage, make_machine_app
from faasmoe_operator.control.background_tasks import BackgroundTasks
from faasmoe_operator.control.config import MachineConfig
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.lease_server import serving_leases
from faasmoe_operator.control.live import PrivacySettings
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.machine_memory import MemoryPool
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.models_file import ModelsFile, ServedModel
from faasmoe_operator.control.process import start_api, start_page
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.sandbox_pool import PooledModel, SandboxPool
from faasmoe_operator.control.state_files import (
    FileUsageStore,
    PopularityFile,
    popularity_path,
    usage_ledger_path,
)
from faasmoe_operator.control.usage_ledger import UsageLedgerWriter
from faasmoe_operator.platforms.base import ProcessSandboxTemplate
from faasmoe_operator.platforms.process import ProcessPlatform
from faasmoe_tracing import NO_TRACER, Tracer, create_tracer

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
STABLE_AFTER_S = 120.0


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that is ready to be controlled.

    Attributes:
        served: where it is.
        model: its functions; without a warm pool, which all models share.
        warm_pool: how many generic sandboxes it asks for.
        template: template of its sandboxes.
        store: its store.
    """

    served: ServedModel
    model: ControlledModel
    warm_pool: int
    template: ProcessSandboxTemplate
    store: Store

    @classmethod
    def load(
        cls, served: ServedModel, *, shares_memory: bool = False, shares_sandboxes: bool = False
    ) -> PlannedModel:
        """Open a model's store and plan its functions; raises FaasmoeError, StoreError, OSError.

        Args:
            served: where the model is.
            shares_memory: whether other models share a memory limit with it.
            shares_sandboxes: whether other models share sandboxes with it.
        """
        local = LocalModel.load(served.file)
        model = ControlledModel.from_local_model(
            local, key=served.function_key, shares_memory=shares_memory
        )
        pooled = replace(model, warm_pool=0, shares_sandboxes=shares_sandboxes)
        return cls(served, pooled, model.warm_pool, local.template, local.open_store())

    @property
    def name(self) -> str:
        """Its name."""
        return self.served.name

    @property
    def pooled(self) -> PooledModel:
        """What the pool of its sandboxes knows of it."""
        return PooledModel(self.model.store.path, self.template, self.warm_pool)


class Machine:
    """The controllers of all models.

    Args:
        models: the models.
        client: calls sandboxes.
        memory: memory that they share; None for no limit.
        privacy: how much of single functions is shown on the live page.
        tracer: traces activations.

    Attributes:
        controllers: the running controllers by model; those that failed are missing.
        memory: as given.
    """

    def __init__(
        self,
        models: Collection[PlannedModel],
        client: SandboxClient,
        *,
        memory: MemoryPool | None,
        privacy: PrivacySettings,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.controllers: dict[str, Controller] = {}
        self.memory = memory
        self._models = {model.name: model for model in models}
        self._client = client
        self._privacy = privacy
        self._tracer = tracer
        self._metrics = {name: ControlPlaneMetrics() for name in self._models}

    async def start(self, pools: Mapping[Path, SandboxPool]) -> None:
        """Adopt the sandboxes of an earlier run and start all controllers.

        Args:
            pools: the sandboxes by the socket of their zygote.
        """
        self._pools = pools
        for pool in pools.values():
            await pool.adopt()
            pool.start_filling()
        for model in self._models.values():
            self.controllers[model.name] = await self._start_controller(model)

    async def run(self) -> None:
        """Run all controllers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for model in self._models.values():
                group.create_task(self._supervise(model))

    async def _supervise(self, model: PlannedModel) -> Never:
        backoff = Backoff(RETRY_DELAYS_S)
        while True:
            started_s = time.monotonic()
            try:
                await self._run_controller(model)
            except Exception:
                logger.exception("the controller of %s failed and restarts", model.name)
            if time.monotonic() - started_s > STABLE_AFTER_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_delay_s())

    async def _run_controller(self, model: PlannedModel) -> None:
        """Run a model's controller, a new one if the last one has failed."""
        controller = self.controllers.get(model.name)
        if controller is None:
            controller = self.controllers[model.name] = await self._start_controller(model)
        popularity_file, usage_store = _state_files(model.store)
        writer = UsageLedgerWriter(
            controller.usage_ledger,
            controller.usage_changed,
            usage_store,
            interval_s=controller.timing.usage_save_interval_s,
        )
        tasks = BackgroundTasks(controller, store=model.store, popularity_file=popularity_file)
        try:
            async with asyncio.TaskGroup() as group:
                for work in (controller.run, tasks.run, writer.run):
                    group.create_task(work())
        finally:
            del self.controllers[model.name]

    async def _start_controller(self, model: PlannedModel) -> Controller:
        popularity_file, usage_store = _state_files(model.store)
        pool = self._pools[model.served.zygote_socket]
        controller = Controller(
            model.model,
            pool.platform_of(model.name),
            self._client,
            popularity=popularity_file.read(),
            usage_ledger=usage_store.read(),
            metrics=self._metrics[model.name],
            privacy=self._privacy,
            tracer=self._tracer,
            memory=None if self.memory is None else self.memory.shared_by(model.name),
            shared_pool=pool,
        )
        await controller.start()
        if self.memory is not None:
            self.memory.join(model.name, controller.function_memory)
        return controller


async def run_machine(config: MachineConfig, phases: StartPhases) -> None:
    """Run the controllers and the API of all models of a file until cancelled.

    Args:
        config: settings of the process.
        phases: the phases of the start so far; logged when the API listens.

    Raises:
        FaasmoeError: a model is invalid, or a zygote does not respond.
        StoreError: a store is missing or damaged.
        OSError: the file cannot be read, or a file of a store is gone.
    """
    file = ModelsFile.read(config.models_file)
    shares_memory = file.memory_bytes is not None and len(file.models) > 1
    models = [
        PlannedModel.load(
            served,
            shares_memory=shares_memory,
            shares_sandboxes=file.shares_sandboxes(served.zygote_socket),
        )
        for served in file.models
    ]
    phases.end("plan")
    memory = None
    if file.memory_bytes is not None:
        memory = MemoryPool(file.memory_bytes, clock=time.monotonic)
    async with AsyncExitStack() as stack:
        if config.lease_socket is not None and config.gateway_file is not None:
            leases = serving_leases(config.gateway_file, config.lease_socket)
            await stack.enter_async_context(leases)
        client = await stack.enter_async_context(SandboxClient(token=config.token))
        pools = {}
        for socket in dict.fromkeys(model.served.zygote_socket for model in models):
            platform = await stack.enter_async_context(ProcessPlatform(socket=socket))
            pool = SandboxPool(
                platform,
                client,
                {m.name: m.pooled for m in models if m.served.zygote_socket == socket},
                is_shared=file.shares_sandboxes(socket),
            )
            pools[socket] = await stack.enter_async_context(pool)
        phases.end("connection")
        privacy = PrivacySettings(min_tokens=config.page_min_tokens)
        tracer = create_tracer(os.environ, service="faasmoe-control")
        stack.callback(tracer.close)
        machine = Machine(models, client, memory=memory, privacy=privacy, tracer=tracer)
        await machine.start(pools)
        app = make_machine_app(
            machine.controllers,
            token=config.token,
            memory=memory,
            n_processes=lambda: sum(pool.n_processes for pool in pools.values()),
        )
        runner = await start_api(app, host=config.control_host, port=config.control_port)
        stack.push_async_callback(runner.cleanup)
        if config.page_socket is not None:
            page = LivePage(
                lambda: sorted(machine.controllers.items()), key=config.page_key or None
            )
            page_runner = await start_page(page, config.page_socket)
            stack.push_async_callback(page_runner.cleanup)
        phases.end("api")
        logger.info("%s", phases.describe())
        await machine.run()


def _state_files(store: Store) -> tuple[PopularityFile, FileUsageStore]:
    """Return where a model's popularity and usage survive restarts."""
    digest = store.manifest.digest
    popularity_file = PopularityFile(popularity_path(store.path), model_digest=digest)
    return popularity_file, FileUsageStore(usage_ledger_path(store.path))
