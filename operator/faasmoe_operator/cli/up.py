"""`faasmoe up -f FILE`: a model served by processes of this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import tempfile
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any, Never

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionTable
from faasmoe_operator.cli import child, router
from faasmoe_operator.cli.checkpoint import prepare_command
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.cli.interruption import interruptible
from faasmoe_operator.cli.logs import Logs, say
from faasmoe_operator.cli.service import Service
from faasmoe_operator.control.residency import Residents, make_resident
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.errors import CommandError, PlatformError
from faasmoe_operator.platforms import Platform, ProcessPlatform

PREPARE_GRACE_S = 10.0


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "up",
        help="serve a MoEModel file on this machine",
        description="Serve a MoEModel file with processes of this machine, until Ctrl-C. The "
        "store is prepared first if there is none.",
    )
    parser.add_argument("-f", "--file", type=Path, required=True, help="MoEModel file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port (%(default)s)")
    parser.add_argument(
        "--log-dir", type=Path, help="write the processes' logs to files here, not to the terminal"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal or a failure."""
    deployment = Deployment.load(arguments.file)
    endpoint = router.Endpoint(arguments.host, arguments.port)
    endpoint.check_free()
    with Logs(arguments.log_dir) as logs:
        return asyncio.run(interruptible(_up(deployment, endpoint, logs)))


async def _up(deployment: Deployment, endpoint: router.Endpoint, logs: Logs) -> int:
    if not deployment.is_prepared:
        await _prepare(deployment)
    store = deployment.open_store()
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-") as folder:  # of mode 0700
        async with ProcessPlatform(token=token, log=logs.sink("sandboxes")) as platform:
            residents = await _fill(deployment, store, platform, token=token)
            table = _write_table(residents.table(store.manifest.digest), Path(folder))
            say("starting the router")
            async with child.running(
                router.COMMAND,
                environment=router.environment(deployment, endpoint, table=table, token=token),
                log=logs.sink("router"),
                grace_s=router.GRACE_S,
            ) as process:
                service = Service(deployment.model.metadata.name, endpoint.url, residents, store)
                return await _serve(service, platform, process, endpoint)


async def _prepare(deployment: Deployment) -> None:
    source, path = deployment.source, deployment.store_path
    say(f"preparing {source} in {path}")
    revision = deployment.model.spec.model.revision
    async with child.running(
        prepare_command(source, str(path), revision=revision, dtype=deployment.dtype),
        environment=os.environ,
        log=None,
        grace_s=PREPARE_GRACE_S,
    ) as preparation:
        if (status := await preparation.status()) != 0:
            raise CommandError(f"the preparation of {source} ended with status {status}")


async def _fill(
    deployment: Deployment, store: Store, platform: Platform, *, token: str
) -> Residents:
    functions = deployment.functions(store.manifest, key=secrets.token_bytes(32))
    async with SandboxClient(token=token) as client:
        return await make_resident(
            functions,
            platform,
            client,
            template=deployment.template,
            store=ModelStore(store.path, store.manifest.digest),
            progress=say,
        )


def _write_table(table: FunctionTable, folder: Path) -> Path:
    path = folder / "functions.json"
    path.write_text(json.dumps(table.to_json()))
    return path


async def _serve(
    service: Service, platform: Platform, process: child.Child, endpoint: router.Endpoint
) -> int:
    names = {sandbox.id for sandbox, _ in service.residents.sandboxes}
    failures = [
        asyncio.create_task(_sandbox_loss(platform, names)),
        asyncio.create_task(_router_end(process)),
    ]
    try:
        await _unless(failures, router.wait_serving(endpoint, progress=say))
        print(service.describe(router_pid=process.pid), flush=True)
        await _until_cancelled(failures)
    finally:
        for failure in failures:
            failure.cancel()
        await asyncio.gather(*failures, return_exceptions=True)
        say("ending")
    return 0


async def _until_cancelled(failures: Collection[asyncio.Task[Never]]) -> None:
    """Return when a signal cancels this task: once the model is served, that is a good end."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await _unless(failures, _never())
    except asyncio.CancelledError:
        task.uncancel()


async def _never() -> None:
    await asyncio.Event().wait()


async def _sandbox_loss(platform: Platform, names: Collection[str]) -> Never:
    async for event in platform.watch():
        if event.kind == "deleted" and event.sandbox.id in names:
            raise PlatformError(f"sandbox {event.sandbox.id} was lost: {event.reason}")
    raise PlatformError("the platform ended")


async def _router_end(process: child.Child) -> Never:
    raise CommandError(f"the router {await process.wait()}")


async def _unless(
    failures: Collection[asyncio.Task[Never]], work: Coroutine[Any, Any, None]
) -> None:
    """Run the work to its end, or until a failure ends it and is raised."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait([task, *failures], return_when=asyncio.FIRST_COMPLETED)
        for ended in [*failures, task]:
            if ended.done():
                await ended
                return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to 65535")
    return int(text)
