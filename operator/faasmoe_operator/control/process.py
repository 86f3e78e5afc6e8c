"""The control process of one model on this machine: composition root and shutdown.

It can be killed at any time: a restarted process adopts the running sandboxes and their functions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from faasmoe_contracts.start_phases import StartPhases
from faasmoe_operator.control.api import LivePage, make_model_app
from faasmoe_operator.control.background_tasks import BackgroundTasks
from faasmoe_operator.control.config import ControlConfig
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.live import PrivacySettings
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.state_files import (
    FileUsageStore,
    PopularityFile,
    popularity_path,
    usage_ledger_path,
)
from faasmoe_operator.control.usage_ledger import UsageLedgerWriter
from faasmoe_operator.platforms.process import ProcessPlatform
from faasmoe_tracing import create_tracer

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 1.0


async def run_until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Run until SIGTERM or SIGINT."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await work
    except asyncio.CancelledError:
        task.uncancel()


async def run_controller(config: ControlConfig, phases: StartPhases) -> None:
    """Run a model's controller, API and background tasks until cancelled.

    Args:
        config: settings of the process.
        phases: the phases of the start so far; logged when the API listens.

    Raises:
        FaasmoeError: the model is invalid or the zygote does not respond.
        StoreError: the store is missing or damaged.
    """
    local_model = LocalModel.load(config.model_file)
    store = local_model.open_store()
    model = ControlledModel.from_local_model(local_model, key=config.function_key)
    tracer = create_tracer(os.environ, service="faasmoe-control")
    popularity_file = PopularityFile(
        popularity_path(store.path), model_digest=store.manifest.digest
    )
    usage_store = FileUsageStore(usage_ledger_path(store.path))
    phases.end("plan")
    async with (
        ProcessPlatform(socket=config.zygote_socket) as platform,
        SandboxClient(token=config.token) as client,
    ):
        phases.end("connection")
        controller = Controller(
            model,
            platform,
            client,
            popularity=popularity_file.read(),
            usage_ledger=usage_store.read(),
            privacy=PrivacySettings(min_tokens=config.page_min_tokens),
            tracer=tracer,
        )
        await controller.start()
        app = make_model_app(controller, token=config.token)
        runners = [await start_api(app, host=config.control_host, port=config.control_port)]
        if config.page_socket is not None:
            models = [(model.name, controller)]
            page = LivePage(lambda: models, key=config.page_key or None)
            runners.append(await start_page(page, config.page_socket))
        phases.end("api")
        logger.info("%s", phases.describe())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(controller.run())
                group.create_task(
                    BackgroundTasks(controller, store=store, popularity_file=popularity_file).run()
                )
                group.create_task(_make_usage_ledger_writer(controller, usage_store).run())
        finally:
            for runner in runners:
                await runner.cleanup()
            tracer.close()


def _make_usage_ledger_writer(controller: Controller, store: FileUsageStore) -> UsageLedgerWriter:
    return UsageLedgerWriter(
        controller.usage_ledger,
        controller.usage_changed,
        store,
        interval_s=controller.timing.usage_save_interval_s,
    )


async def start_api(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Serve the control API until its runner is cleaned up; raises OSError."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.TCPSite(runner, host, port, reuse_address=True, backlog=128).start()
    logger.info("control listens on %s:%d", host, port)
    return runner


async def start_page(page: LivePage, path: Path) -> web.AppRunner:
    """Serve the live page on a Unix socket, which the gateway forwards to; raises OSError."""
    runner = web.AppRunner(page.make_app(), access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    return runner
