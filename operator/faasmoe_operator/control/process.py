"""The control process: everything put together, until SIGTERM.

It may be killed at any moment and started again: what runs is read back.
"""

from __future__ import annotations

import asyncio
import logging
import signal

from aiohttp import web

from faasmoe_operator.control.api import make_app
from faasmoe_operator.control.config import ControlConfig
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.control.housekeeping import Housekeeping
from faasmoe_operator.control.ledger_file import LedgerFile, ledger_path
from faasmoe_operator.control.ledger_keeper import LedgerKeeper
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.popularity_file import PopularityFile, popularity_path
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.platforms import ProcessPlatform

logger = logging.getLogger(__name__)

SHUTDOWN_S = 1.0


async def serve(config: ControlConfig) -> None:
    """Control a model until SIGTERM or SIGINT; raises FaasmoeError or StoreError."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await _control(config)
    except asyncio.CancelledError:
        task.uncancel()


async def _control(config: ControlConfig) -> None:
    deployment = Deployment.load(config.model_file)
    store = deployment.open_store()
    model = ControlledModel.of(deployment, key=config.function_key)
    file = PopularityFile(popularity_path(store.path), model_digest=store.manifest.digest)
    accounts = LedgerFile(ledger_path(store.path))
    async with (
        ProcessPlatform(socket=config.zygote_socket) as platform,
        SandboxClient(token=config.token) as client,
    ):
        controller = Controller(
            model, platform, client, popularity=file.read(), ledger=accounts.read()
        )
        await controller.start()
        runner = await _listen(controller, config)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(controller.run())
                group.create_task(Housekeeping(controller, store=store, file=file).run())
                group.create_task(_keep(controller, accounts).run())
        finally:
            await runner.cleanup()


def _keep(controller: Controller, file: LedgerFile) -> LedgerKeeper:
    return LedgerKeeper(
        controller.ledger,
        controller.ledger_changed,
        file.write,
        interval_s=controller.timing.accounts_interval_s,
    )


async def _listen(controller: Controller, config: ControlConfig) -> web.AppRunner:
    app = make_app(controller, token=config.token)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    site = web.TCPSite(
        runner, config.control_host, config.control_port, reuse_address=True, backlog=128
    )
    await site.start()
    logger.info("control listens on %s:%d", config.control_host, config.control_port)
    return runner
