"""Processes that strategies run beside `faasmoe up`: routers, full models, a resident sandbox."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.evaluation.client import TenantEndpoint
from benchmarks.evaluation.models import MODEL_NAME

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_operator.cli import child_process, router
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient, SandboxClientError
from faasmoe_operator.platforms.zygote import SOCKET_DIR_VARIABLE, shared_dir_variables

logger = logging.getLogger(__name__)

FULL_MODEL = (sys.executable, "-m", "benchmarks.evaluation.full_model")
SANDBOX = (sys.executable, "-m", "faasmoe_expert")
HOST = "127.0.0.1"
PROBE_INTERVAL_S = 0.1
SANDBOX_TIMEOUT_S = 120.0
GRACE_S = 40.0
UNREACHABLE_ADDRESS = "127.0.0.1:1"  # an address in the table of a server that calls no function
TABLE_NAME = "functions.json"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A process that answers tenants."""

    endpoint: TenantEndpoint
    pid: int


@dataclass(frozen=True, slots=True)
class ResidentSandbox:
    """The sandbox that holds all functions and never changes."""

    pid: int
    table: Path
    token: str


@asynccontextmanager
async def running_servers(
    command: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> AsyncIterator[tuple[RunningServer, ...]]:
    """Run a server for each environment, which names its port, as long as the context lasts.

    They start at the same time, and all serve when the context is entered.
    """
    async with AsyncExitStack() as stack:
        processes = [
            await stack.enter_async_context(
                child_process.running_child(
                    command, environment=e, log=logger.info, grace_s=GRACE_S
                )
            )
            for e in environments
        ]
        addresses = [router.Endpoint(HOST, int(e["FAASMOE_PORT"])) for e in environments]
        await asyncio.gather(*map(_wait_until_healthy, processes, addresses))
        yield tuple(
            RunningServer(TenantEndpoint(address.url, MODEL_NAME), process.pid)
            for process, address in zip(processes, addresses, strict=True)
        )


async def _wait_until_healthy(
    process: child_process.ChildProcess, address: router.Endpoint
) -> None:
    """Wait until a server serves; raises RuntimeError with its last lines if it ends instead."""
    exited = asyncio.create_task(process.describe_exit())
    healthy = asyncio.create_task(router.wait_until_healthy(address, progress=logger.info))
    try:
        await asyncio.wait([exited, healthy], return_when=asyncio.FIRST_COMPLETED)
        if not healthy.done():
            raise RuntimeError(f"a server {await exited}")
        await healthy
    finally:
        for task in (exited, healthy):
            task.cancel()
        await asyncio.gather(exited, healthy, return_exceptions=True)


def router_environment(
    deployment: LocalModel, *, control_url: str = "", table: Path | None = None, token: str = ""
) -> dict[str, str]:
    """Return the environment of a router that follows a control process, or has a fixed table."""
    endpoint = router.Endpoint(HOST, _free_port())
    environment = router.environment(deployment, endpoint, control_url=control_url, token=token)
    if table is not None:
        del environment["FAASMOE_CONTROL_URL"]
        environment["FAASMOE_TABLE"] = str(table)
    return environment


def unix_socket_environment(launcher_pid: int) -> dict[str, str]:
    """Return what the router of a `faasmoe up` was told of the sandboxes of its machine."""
    for process in psutil.Process(launcher_pid).children():
        found = process.environ()
        if "FAASMOE_STORE" in found and SOCKET_DIR_VARIABLE in found:
            return shared_dir_variables(Path(found[SOCKET_DIR_VARIABLE]).parent)
    raise RuntimeError(f"process {launcher_pid}: got no router below it, expected one")


def write_routing_table(deployment: LocalModel, address: str, folder: Path) -> Path:
    """Write a table in which every function has the same address."""
    manifest = deployment.open_store().manifest
    functions = deployment.functions(manifest, key=secrets.token_bytes(32))
    entries = tuple(FunctionEndpoints(function, (address,)) for function in functions)
    table = RoutingTable(manifest.digest, 0, entries)
    path = folder / TABLE_NAME
    path.write_text(json.dumps(table.to_json()), encoding="utf-8")
    return path


@asynccontextmanager
async def running_resident_sandbox(
    deployment: LocalModel, folder: Path
) -> AsyncIterator[ResidentSandbox]:
    """Run one sandbox that holds every function, as long as the context lasts.

    It computes with every core: nothing else does while it is called.
    """
    port, token = _free_port(), secrets.token_urlsafe(32)
    table = write_routing_table(deployment, f"{HOST}:{port}", folder)
    functions = RoutingTable.loads(table.read_bytes()).functions
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "FAASMOE_PORT": str(port),
        "FAASMOE_TOKEN": token,
        "FAASMOE_CAPACITY": str(len(functions)),
        "FAASMOE_THREADS": str(len(os.sched_getaffinity(0))),
        "FAASMOE_DEVICE": "cpu",
        **shared_dir_variables(folder),
    }
    async with child_process.running_child(
        SANDBOX, environment=environment, log=logger.info, grace_s=GRACE_S
    ) as process:
        await _attach(deployment, functions, f"{HOST}:{port}", token)
        yield ResidentSandbox(process.pid, table, token)


async def _attach(
    deployment: LocalModel, functions: Sequence[FunctionEndpoints], address: str, token: str
) -> None:
    store = deployment.open_store()
    model_store = ModelStore(store.path, store.manifest.digest)
    async with SandboxClient(token=token) as client, asyncio.timeout(SANDBOX_TIMEOUT_S):
        await _wait_until_reachable(client, address)
        for entry in functions:
            await client.attach(address, entry.spec, store=model_store)


async def _wait_until_reachable(client: SandboxClient, address: str) -> None:
    while True:
        try:
            await client.list(address)
            return
        except SandboxClientError as error:
            if error.code != "unreachable":
                raise
        await asyncio.sleep(PROBE_INTERVAL_S)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
