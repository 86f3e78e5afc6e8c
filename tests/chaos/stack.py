"""The system under test: zygote, control, router as `faasmoe up` runs them, with proxies between.

Sandboxes attach from a copy of the store, so that its bits may be flipped while the router keeps a
sound one, as on another node.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
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
PROXIES_NAME = "p"  # short: a Unix socket's path has few characters
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
    sizes = {"experts": experts, "capacity": capacity, "twice": twice}
    deployments = {}
    for name, path in (("router", store), ("control", copy)):
        file = folder / f"{name}.yaml"
        file.write_text(MOEMODEL.format(name=NAME, model=model, store=path, tenants=told, **sizes))
        deployments[name] = Deployment.load(file)
    async with AsyncExitStack() as stack:
        # Short: a unix socket's path has few characters.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        logs = stack.enter_context(Logs(folder / "logs"))
        port, secrets = ControlPort.reserve(), Secrets("chaos-token", os.urandom(32).hex())
        stack.callback(port.close)
        processes = _Processes(stack, private, logs, port, secrets)
        near = private / PROXIES_NAME
        near.mkdir()
        proxy = ZygoteProxy(private / "proxy.sock", private / "zygote.sock", near=near)
        zygote_child = await processes.zygote()
        await proxy.open()
        stack.push_async_callback(proxy.end)
        control_child = await processes.control(deployments["control"])
        endpoint = router.Endpoint("127.0.0.1", _free_port())
        router_child = await processes.router(deployments["router"], endpoint)
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


@dataclass(frozen=True, slots=True)
class _Processes:
    """Starts the processes, which end with the stack."""

    stack: AsyncExitStack
    private: Path
    logs: Logs
    port: ControlPort
    secrets: Secrets

    async def zygote(self) -> Kept:
        return await self._kept(
            "zygote",
            zygote.COMMAND,
            zygote.zygote_environment(self.private / "zygote.sock", token=self.secrets.token),
            log="sandboxes",
            grace_s=10.0,
        )

    async def control(self, deployment: Deployment) -> Kept:
        environment = control.environment(
            deployment.file,
            zygote_socket=self.private / "proxy.sock",
            port=self.port,
            secrets=self.secrets,
        )
        grace_s = control.GRACE_S
        return await self._kept(
            "control process", control.COMMAND, environment, log="control", grace_s=grace_s
        )

    async def router(self, deployment: Deployment, endpoint: router.Endpoint) -> child.Child:
        settings = router.environment(
            deployment,
            endpoint,
            control_url=self.port.url,
            token=self.secrets.token,
            tenants_file=write_tenants(deployment, self.private),
        )
        near = {
            zygote.SOCKETS_VARIABLE: str(self.private / PROXIES_NAME),
            zygote.VERIFIED_VARIABLE: str(self.private / "router-verified"),
        }
        return await self.stack.enter_async_context(
            child.running(
                router.COMMAND,
                environment={**settings, **near},
                log=self.logs.sink("router"),
                grace_s=router.GRACE_S,
            )
        )

    async def _kept(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: str,
        grace_s: float,
    ) -> Kept:
        found, _ = await self.stack.enter_async_context(
            kept(
                name,
                command,
                environment=environment,
                log=self.logs.sink(log),
                grace_s=grace_s,
                restarts=RESTARTS,
            )
        )
        return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
