"""The system under test: zygote, control, router as `faasmoe up` runs them, with proxies between.

Sandboxes attach from a copy of the store, so that its bits may be flipped while the router keeps a
sound one, as on another node.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from tests.chaos.proxies import ZygoteProxy
from tests.chaos.tenants import Tenant, write_tenants_of

from faasmoe_operator.cli import child, control, router
from faasmoe_operator.cli.control import ControlPort, Secrets
from faasmoe_operator.cli.logs import Logs
from faasmoe_operator.cli.supervision import Kept, Restarts, kept
from faasmoe_operator.cli.tenants import write_tenants
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.platforms import zygote

MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: {name}}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: {experts}}}
  router: {{maxModelLen: 256, maxNumSeqs: 8, maxNumBatchedTokens: 12, device: cpu}}
  experts:
    device: cpu
    functionsPerSandbox: {capacity}
    warmPool: 2
    scaling:
      minScale: 1
      maxScale: 3
      windowSeconds: 30
      overrides: [{{layers: "{twice}", minScale: 2}}]
  tenants: {tenants}
"""
RESTARTS = Restarts(delays_s=(0.0, 0.1), most=10_000)  # we are the ones who kill
NAME = "chaos"


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs.

    Attributes:
        url: the router.
        zygote: the zygote process.
        control: the control process.
        router: the router process.
        proxy: knows the sandboxes.
        copy: the store that sandboxes attach from.
        folder: where the logs are.
        tenants: who may ask.
    """

    url: str
    zygote: Kept
    control: Kept
    router: child.Child
    proxy: ZygoteProxy
    copy: Path
    folder: Path
    tenants: tuple[Tenant, ...]

    async def router_metrics(self) -> dict[str, float]:
        """Return the router's samples that have no label."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        found = re.findall(r"^(faasmoe_router_\w+) (\S+)$", text, re.MULTILINE)
        return {name.removeprefix("faasmoe_router_"): float(value) for name, value in found}

    async def requests_of(self, tenant: Tenant) -> int:
        """Return how many of a tenant's requests its account holds as answered to their end."""
        url = f"{self.url}{tenant.path}/usage"
        async with aiohttp.ClientSession() as http, http.get(url, headers=tenant.headers) as answer:
            account = await answer.json()
        return int(account["requests"].get("completed", 0))


@asynccontextmanager
async def running_stack(
    model: Path,
    store: Path,
    *,
    tenants: Sequence[Tenant],
    experts: int,
    capacity: int,
    twice: str,
    folder: Path,
) -> AsyncIterator[Stack]:
    """Run everything as long as the context lasts.

    Args:
        model: the checkpoint that the store was prepared from.
        store: the prepared store.
        tenants: who may ask.
        experts: experts of a function.
        capacity: functions of a sandbox.
        twice: layers whose functions have two replicas, such as 0-3.
        folder: for the copy of the store, for the tenants' keys, and for logs.
    """
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    told = json.dumps(write_tenants_of(tenants, folder))
    deployments = {}
    for name, path in (("router", store), ("control", copy)):
        file = folder / f"{name}.yaml"
        sizes = {"experts": experts, "capacity": capacity, "twice": twice}
        text = MOEMODEL.format(name=NAME, model=model, store=path, tenants=told, **sizes)
        file.write_text(text)
        deployments[name] = Deployment.load(file)
    async with AsyncExitStack() as stack:
        # Short: a unix socket's path has few characters.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        logs = stack.enter_context(Logs(folder / "logs"))
        port, secrets = ControlPort.reserve(), Secrets("chaos-token", os.urandom(32).hex())
        stack.callback(port.close)
        proxy = ZygoteProxy(private / "proxy.sock", private / "zygote.sock")
        zygote_child, _ = await stack.enter_async_context(
            kept(
                "zygote",
                zygote.COMMAND,
                environment=zygote.zygote_environment(private / "zygote.sock", token=secrets.token),
                log=logs.sink("sandboxes"),
                grace_s=10.0,
                restarts=RESTARTS,
            )
        )
        await proxy.open()
        stack.push_async_callback(proxy.end)
        control_child, _ = await stack.enter_async_context(
            kept(
                "control process",
                control.COMMAND,
                environment=control.environment(
                    deployments["control"].file,
                    zygote_socket=private / "proxy.sock",
                    port=port,
                    secrets=secrets,
                ),
                log=logs.sink("control"),
                grace_s=control.GRACE_S,
                restarts=RESTARTS,
            )
        )
        endpoint = router.Endpoint("127.0.0.1", _free_port())
        settings = router.environment(
            deployments["router"],
            endpoint,
            control_url=port.url,
            token=secrets.token,
            tenants_file=write_tenants(deployments["router"], private),
        )
        router_child = await stack.enter_async_context(
            child.running(
                router.COMMAND,
                environment={
                    **settings,
                    zygote.VERIFIED_VARIABLE: str(private / "router-verified"),
                },
                log=logs.sink("router"),
                grace_s=router.GRACE_S,
            )
        )
        await router.wait_serving(endpoint, progress=print)
        yield Stack(
            endpoint.url,
            zygote_child,
            control_child,
            router_child,
            proxy,
            copy,
            folder,
            tuple(tenants),
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def wait_replicas(stack: Stack, n_sandboxes: int, *, timeout_s: float = 120.0) -> None:
    """Wait until so many sandboxes run."""
    async with asyncio.timeout(timeout_s):
        while len(stack.proxy.sandboxes) < n_sandboxes:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
