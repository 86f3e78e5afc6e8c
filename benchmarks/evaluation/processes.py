"""Processes that strategies run besides `faasmoe up`: routers, full models, a resident sandbox."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.evaluation.client import TenantEndpoint
from benchmarks.evaluation.models import MODEL_NAME
from benchmarks.server_process import free_port

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_operator.cli import child_process, router
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient, SandboxClientError
from faasmoe_operator.platforms.zygote import ZYGOTE_COMMAND, shared_dir_variables

logger = logging.getLogger(__name__)

FULL_MODEL = (sys.executable, "-m", "benchmarks.evaluation.full_model")
SANDBOX = (sys.executable, "-m", "faasmoe_expert")
HOST = "127.0.0.1"
PROBE_INTERVAL_S = 0.1
SANDBOX_TIMEOUT_S = 120.0
GRACE_S = 40.0
UNREACHABLE_ADDRESS = "127.0.0.1:1"  # routing-table address for servers that call no functions
TABLE_NAME = "functions.json"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server process and its endpoint."""

    endpoint: TenantEndpoint
    pid: int


@dataclass(frozen=True, slots=True)
class ResidentSandbox:
    """A sandbox to which all functions are attached permanently.

    Attributes:
        pid: its process id.
        table: routing-table file that points to it.
        token: its bearer token.
    """

    pid: int
    table: Path
    token: str


@asynccontextmanager
async def running_servers(
    command: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> AsyncIterator[tuple[RunningServer, ...]]:
    """Run one server per environment for the lifetime of the context.

    Each environment sets FAASMOE_PORT. The servers start concurrently and are healthy when the
    context is entered.
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
    """Wait until a server is healthy; raises RuntimeError with its last log lines if it exits."""
    exited = asyncio.create_task(process.describe_exit())
    healthy = asyncio.create_task(router.wait_until_healthy(address, progress=logger.info))
    try:
        await asyncio.wait([exited, healthy], return_when=asyncio.FIRST_COMPLETED)
        if not healthy.done():
            raise RuntimeError(f"the server {await exited}")
        await healthy
    finally:
        for task in (exited, healthy):
            task.cancel()
        await asyncio.gather(exited, healthy, return_exceptions=True)


def router_environment(
    deployment: LocalModel, *, control_url: str = "", table: Path | None = None, token: str = ""
) -> dict[str, str]:
    """Return the environment of a router with a control process or a static routing table.

    Args:
        deployment: the model.
        control_url: base URL of the control API; ignored with a table.
        table: routing-table file.
        token: bearer token of control process and sandboxes.
    """
    endpoint = router.Endpoint(HOST, free_port())
    environment = router.environment(deployment, endpoint, control_url=control_url, token=token)
    if table is not None:
        del environment["FAASMOE_CONTROL_URL"]
        environment["FAASMOE_TABLE"] = str(table)
    return {**environment, "FAASMOE_METRICS_MIN_TOKENS": "1"}  # calls are counted exactly


def unix_socket_environment(launcher_pid: int) -> dict[str, str]:
    """Return the variables by which the router of a `faasmoe up` finds its Unix sockets.

    Raises:
        RuntimeError: the launcher has no zygote of sandboxes, whose sockets these are.
    """
    for process in psutil.Process(launcher_pid).children():
        if ZYGOTE_COMMAND[-1] in process.cmdline():
            # Not in its environment, of which a forked process shows that of its parent.
            listening = (Path(c.laddr) for c in process.net_connections("unix") if c.laddr)
            return shared_dir_variables(next(listening).parent)
    raise RuntimeError(f"process {launcher_pid}: got no zygote of sandboxes, expected one")


def write_routing_table(deployment: LocalModel, address: str, folder: Path) -> Path:
    """Write a routing table in which every function has the same address."""
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
    """Run a sandbox with all functions of a model for the lifetime of the context.

    It uses all cores, because nothing else computes while it is called.
    """
    port, token = free_port(), secrets.token_urlsafe(32)
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
