"""`faasmoe up -f FILE`: a model served by processes of this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
from collections.abc import Collection, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any, Never

from faasmoe_expert.store import Store
from faasmoe_operator.cli import child, control, router
from faasmoe_operator.cli.checkpoint import prepare_command
from faasmoe_operator.cli.devices import check_devices
from faasmoe_operator.cli.interruption import interruptible
from faasmoe_operator.cli.launch import Launch, Processes, running_processes
from faasmoe_operator.cli.logs import Logs, say
from faasmoe_operator.cli.memory import format_bytes
from faasmoe_operator.cli.runtime import announce, runtime_folder
from faasmoe_operator.cli.service import describe
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.errors import CommandError
from faasmoe_operator.spec.platform import platform_notes

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
    parser.add_argument(
        "--skip-verify", action="store_true", help="trust the store: do not check its checksums"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal or a failure."""
    deployment = Deployment.load(arguments.file)
    deployment.check_keys()
    for note in platform_notes(deployment.model):
        say(note)
    endpoint = router.Endpoint(arguments.host, arguments.port)
    endpoint.check_free()
    with Logs(arguments.log_dir) as logs:
        trusted = arguments.skip_verify
        return asyncio.run(interruptible(_up(deployment, endpoint, logs, trusted=trusted)))


async def _up(
    deployment: Deployment, endpoint: router.Endpoint, logs: Logs, *, trusted: bool
) -> int:
    await check_devices(deployment)
    if not deployment.is_prepared:
        await _prepare(deployment)
        trusted = True  # the checksums were made this moment
    store = deployment.open_store()
    # Refused here, where the user reads it, and not in a child.
    deployment.functions(store.manifest, key=secrets.token_bytes(32))
    if not trusted:
        await _verify(store)
    with runtime_folder() as folder, closing(control.ControlPort.reserve()) as port:
        launch = Launch.make(deployment, endpoint, folder=folder, port=port)
        announce(launch.running, folder)
        say("starting zygote, control process and router")
        async with running_processes(launch, logs) as processes:
            return await _serve(launch, processes)


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


async def _verify(store: Store) -> None:
    """Check the store's files, one after the other, so that a signal need not wait for them all."""
    files = store.manifest.files
    size = format_bytes(sum(file.size_bytes for file in files.values()))
    say(f"checking the store's {len(files)} files, {size} (--skip-verify leaves it out)")
    for name in files:
        await asyncio.to_thread(store.verify, [name])


async def _serve(launch: Launch, processes: Processes) -> int:
    """Serve until a signal cancels this task: once the model is served, that is a good end."""
    task, serving = asyncio.current_task(), asyncio.Event()
    assert task is not None
    try:
        await _unless(processes.failures, _tell_when_serving(launch, processes, serving))
        await _unless(processes.failures, _never())
    except asyncio.CancelledError:
        if not serving.is_set():
            raise
        task.uncancel()
    finally:
        say("ending")
    return 0


async def _tell_when_serving(launch: Launch, processes: Processes, serving: asyncio.Event) -> None:
    url = launch.port.url
    await control.wait_answering(url)
    await router.wait_serving(launch.endpoint, progress=say)
    status = await control.fetch_status(url, token=launch.secrets.token)
    text = describe(
        status,
        url=launch.endpoint.url,
        control_url=url,
        pids=processes.pids,
        tenants=[tenant.name for tenant in launch.deployment.model.spec.tenants],
    )
    serving.set()  # before it is told: whoever reads it may send the signal at once
    print(text, flush=True)


async def _never() -> None:
    await asyncio.Event().wait()


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
