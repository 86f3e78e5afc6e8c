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
from tests.chaos.tenants import ChaosTenant, write_tenant_keys

from faasmoe_operator.cli import child_process, control, router
from faasmoe_operator.cli.control import ReservedControlPort, StackSecrets
from faasmoe_operator.cli.local_stack import write_tenants_file
from faasmoe_operator.cli.logs import LogSinks
from faasmoe_operator.cli.supervisor import RestartPolicy, SupervisedChild, supervised
from faasmoe_operator.control.local_model import LocalModel
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
RESTART_POLICY = RestartPolicy(
    backoff_s=(0.0, 0.1), max_failures=10_000
)  # we are the ones who kill
PROXY_SOCKET_DIR = "p"  # short: a Unix socket's path has few characters
MODEL_NAME = "chaos"


@dataclass(frozen=True, slots=True)
class ChaosStack:
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
    zygote: SupervisedChild
    control: SupervisedChild
    router: child_process.ChildProcess
    proxy: ZygoteProxy
    store_copy: Path
    folder: Path
    tenants: tuple[ChaosTenant, ...]

    async def router_metrics(self) -> dict[str, float]:
        """Return the router's samples that have no label."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as response:
            text = await response.text()
        found = re.findall(r"^(faasmoe_router_\w+) (\S+)$", text, re.MULTILINE)
        return {name.removeprefix("faasmoe_router_"): float(value) for name, value in found}

    async def completed_requests(self, tenant: ChaosTenant) -> int:
        """Return how many of a tenant's requests its account holds as answered to their end."""
        url = f"{self.url}{tenant.path}/usage"
        async with (
            aiohttp.ClientSession() as http,
            http.get(url, headers=tenant.headers) as response,
        ):
            usage = await response.json()
        return int(usage["requests"].get("completed", 0))


@asynccontextmanager
async def running_chaos_stack(
    model: Path,
    store: Path,
    *,
    tenants: Sequence[ChaosTenant],
    experts: int,
    capacity: int,
    replicated_layers: str,
    folder: Path,
) -> AsyncIterator[ChaosStack]:
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
    store_copy = folder / "copy"
    shutil.rmtree(store_copy, ignore_errors=True)
    shutil.copytree(store, store_copy)
    tenants_yaml = json.dumps(write_tenant_keys(tenants, folder))
    sizes = {"experts": experts, "capacity": capacity, "twice": replicated_layers}
    deployments = {}
    for name, path in (("router", store), ("control", store_copy)):
        file = folder / f"{name}.yaml"
        file.write_text(
            MOEMODEL.format(name=MODEL_NAME, model=model, store=path, tenants=tenants_yaml, **sizes)
        )
        deployments[name] = LocalModel.load(file)
    async with AsyncExitStack() as stack:
        # Short: a unix socket's path has few characters.
        private_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        logs = stack.enter_context(LogSinks(folder / "logs"))
        port, secrets = (
            ReservedControlPort.reserve(),
            StackSecrets("chaos-token", os.urandom(32).hex()),
        )
        stack.callback(port.close)
        processes = _ProcessStarter(stack, private_dir, logs, port, secrets)
        proxy_sockets = private_dir / PROXY_SOCKET_DIR
        proxy_sockets.mkdir()
        proxy = ZygoteProxy(
            private_dir / "proxy.sock", private_dir / "zygote.sock", socket_dir=proxy_sockets
        )
        zygote_child = await processes.zygote()
        await proxy.open()
        stack.push_async_callback(proxy.close)
        control_child = await processes.control(deployments["control"])
        endpoint = router.Endpoint("127.0.0.1", _free_port())
        router_child = await processes.router(deployments["router"], endpoint)
        await router.wait_until_healthy(endpoint, progress=print)
        yield ChaosStack(
            endpoint.url,
            zygote_child,
            control_child,
            router_child,
            proxy,
            store_copy,
            folder,
            tuple(tenants),
        )


@dataclass(frozen=True, slots=True)
class _ProcessStarter:
    """Starts the processes, which end with the stack."""

    stack: AsyncExitStack
    private_dir: Path
    logs: LogSinks
    port: ReservedControlPort
    secrets: StackSecrets

    async def zygote(self) -> SupervisedChild:
        return await self._supervised(
            "zygote",
            zygote.ZYGOTE_COMMAND,
            zygote.zygote_environment(self.private_dir / "zygote.sock", token=self.secrets.token),
            log="sandboxes",
            grace_s=10.0,
        )

    async def control(self, deployment: LocalModel) -> SupervisedChild:
        environment = control.environment(
            deployment.file,
            zygote_socket=self.private_dir / "proxy.sock",
            port=self.port,
            secrets=self.secrets,
        )
        grace_s = control.GRACE_S
        return await self._supervised(
            "control process", control.COMMAND, environment, log="control", grace_s=grace_s
        )

    async def router(
        self, deployment: LocalModel, endpoint: router.Endpoint
    ) -> child_process.ChildProcess:
        settings = router.environment(
            deployment,
            endpoint,
            control_url=self.port.url,
            token=self.secrets.token,
            tenants_file=write_tenants_file(deployment, self.private_dir),
        )
        socket_variables = {
            zygote.SOCKET_DIR_VARIABLE: str(self.private_dir / PROXY_SOCKET_DIR),
            zygote.VERIFIED_DIR_VARIABLE: str(self.private_dir / "router-verified"),
        }
        return await self.stack.enter_async_context(
            child_process.running_child(
                router.COMMAND,
                environment={**settings, **socket_variables},
                log=self.logs.sink("router"),
                grace_s=router.GRACE_S,
            )
        )

    async def _supervised(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: str,
        grace_s: float,
    ) -> SupervisedChild:
        found, _ = await self.stack.enter_async_context(
            supervised(
                name,
                command,
                environment=environment,
                log=self.logs.sink(log),
                grace_s=grace_s,
                restarts=RESTART_POLICY,
            )
        )
        return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
