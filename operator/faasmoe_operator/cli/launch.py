"""The processes of one `faasmoe up`: which, with what environment, in which order they end."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from faasmoe_operator.cli import child, control, router
from faasmoe_operator.cli.control import ControlPort, Secrets
from faasmoe_operator.cli.logs import Logs
from faasmoe_operator.cli.runtime import Running
from faasmoe_operator.cli.supervision import Kept, kept
from faasmoe_operator.cli.tenants import write_tenants
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.errors import CommandError
from faasmoe_operator.platforms import zygote

ZYGOTE_GRACE_S = 10.0
SOCKET_NAME = "zygote.sock"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is to run.

    Attributes:
        deployment: the model.
        endpoint: where the router listens.
        folder: the private folder.
        port: of the control API.
        secrets: that the processes share.
    """

    deployment: Deployment
    endpoint: router.Endpoint
    folder: Path
    port: ControlPort
    secrets: Secrets

    @classmethod
    def make(
        cls, deployment: Deployment, endpoint: router.Endpoint, *, folder: Path, port: ControlPort
    ) -> Launch:
        """Return a launch with secrets of its own."""
        made = Secrets(secrets.token_urlsafe(32), secrets.token_hex(32))
        return cls(deployment, endpoint, folder, port, made)

    @property
    def running(self) -> Running:
        """What other commands may know of it."""
        name, file = self.deployment.model.metadata.name, self.deployment.file.resolve()
        return Running(name, str(file), os.getpid(), self.port.url, self.secrets.token)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that run.

    Attributes:
        zygote: forks the sandboxes.
        control: decides.
        router: answers.
        failures: each raises when one of them cannot be kept running.
    """

    zygote: Kept
    control: Kept
    router: child.Child
    failures: tuple[asyncio.Task[Never], ...]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process ids by name."""
        return {
            "router": self.router.pid,
            "control": self.control.pid,
            "zygote": self.zygote.pid,
        }


@asynccontextmanager
async def running_processes(launch: Launch, logs: Logs) -> AsyncIterator[Processes]:
    """Run all of them; the router ends first, so that its last requests find their functions."""
    socket, token = launch.folder / SOCKET_NAME, launch.secrets.token
    async with AsyncExitStack() as stack:
        zygote_child, zygote_failure = await stack.enter_async_context(
            kept(
                "zygote",
                zygote.COMMAND,
                environment=zygote.zygote_environment(
                    socket,
                    token=token,
                    store=launch.deployment.store_path,
                    device=launch.deployment.template.device,
                ),
                log=logs.sink("sandboxes"),
                grace_s=ZYGOTE_GRACE_S,
            )
        )
        control_child, control_failure = await stack.enter_async_context(
            kept(
                "control process",
                control.COMMAND,
                environment=control.environment(
                    launch.deployment.file,
                    zygote_socket=socket,
                    port=launch.port,
                    secrets=launch.secrets,
                ),
                log=logs.sink("control"),
                grace_s=control.GRACE_S,
            )
        )
        router_child = await stack.enter_async_context(
            child.running(
                router.COMMAND,
                environment={
                    **router.environment(
                        launch.deployment,
                        launch.endpoint,
                        control_url=launch.port.url,
                        token=token,
                        tenants_file=write_tenants(launch.deployment, launch.folder),
                    ),
                    **zygote.near_variables(launch.folder),
                },
                log=logs.sink("router"),
                grace_s=router.GRACE_S,
            )
        )
        router_failure = asyncio.create_task(_end_of(router_child))
        stack.push_async_callback(_cancel, router_failure)
        failures = (zygote_failure, control_failure, router_failure)
        yield Processes(zygote_child, control_child, router_child, failures)


async def _end_of(process: child.Child) -> Never:
    raise CommandError(f"the router {await process.wait()}")


async def _cancel(task: asyncio.Task[Never]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
