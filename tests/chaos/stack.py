"""The system under test: the processes of `faasmoe up`, with proxies between them.

Sandboxes use a copy of the store, so that faults can corrupt it while the router has an intact
store, as if it were on another node. The router's blocks are verified from the start: with
`faasmoe up`, sandboxes that attach functions verify the store that the router maps, too. The zygote
warms up with the sandboxes' store, as it does there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from faasmoe_up import free_port
from moemodel_files import write_moemodel
from tests.chaos.proxies import ZygoteProxy
from tests.chaos.tenants import ChaosTenant, write_tenant_keys

from faasmoe_contracts.store import Store
from faasmoe_expert.functions.verification import BlockVerifier, VerifiedBlocks
from faasmoe_operator.cli import control, gateway, router
from faasmoe_operator.cli.control import ReservedControlPort, StackSecrets
from faasmoe_operator.cli.logs import LogSinks
from faasmoe_operator.cli.stack_files import write_tenants_file
from faasmoe_operator.cli.supervisor import (
    RestartPolicy,
    SupervisedChild,
    supervised,
    supervised_start,
)
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.platforms import zygote

ROUTER_SPEC = {"maxModelLen": 256, "maxNumSeqs": 8, "maxNumBatchedTokens": 12, "device": "cpu"}
# Restarts without limit, because the faults kill processes.
RESTART_POLICY = RestartPolicy(backoff_s=(0.0, 0.1), max_failures=10_000)
SANDBOX_SOCKET_DIR = "s"
ROUTER_VERIFIED_DIR = "router-verified"
PROXY_SOCKET_DIR = "p"  # short, because the path of a Unix socket is limited to 107 bytes
MODEL_NAME = "chaos"
RESTART_TIMEOUT_S = 60.0
ACTIVE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class ChaosStack:
    """A running system.

    Attributes:
        url: base URL of the gateway.
        zygote: the zygote process.
        control: the control process.
        router: the router process.
        proxy: proxy of the zygote, with the proxies of all sandboxes.
        store_copy: the store that sandboxes use.
        folder: folder with the logs.
        tenants: the tenants of the model.
        lost_metrics: samples of the routers that were killed, just before.
    """

    url: str
    zygote: SupervisedChild
    control: SupervisedChild
    router: SupervisedChild
    proxy: ZygoteProxy
    store_copy: Path
    folder: Path
    tenants: tuple[ChaosTenant, ...]
    lost_metrics: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def router_metrics(self) -> dict[str, float]:
        """Return the router's samples without labels, by name without the prefix."""
        text = (await self._get("/metrics", self.tenants[0].headers)).decode()
        samples = re.findall(r"^(faasmoe_router_\w+) (\S+)$", text, re.MULTILINE)
        return {name.removeprefix("faasmoe_router_"): float(value) for name, value in samples}

    async def total_metrics(self) -> dict[str, float]:
        """Return the samples over all routers so far; meaningful for counters."""
        now = await self.router_metrics()
        return {name: value + self.lost_metrics[name] for name, value in now.items()}

    async def completed_requests(self, tenant: ChaosTenant) -> int:
        """Return the number of completed requests in a tenant's usage account."""
        usage = json.loads(await self._get(f"{tenant.path}/usage", tenant.headers))
        return int(usage["requests"].get("completed", 0))

    async def _get(self, path: str, headers: Mapping[str, str]) -> bytes:
        """Return a body; waits for a router that is being restarted."""
        end_s = time.monotonic() + RESTART_TIMEOUT_S
        async with aiohttp.ClientSession(headers=headers) as http:
            while True:
                async with http.get(f"{self.url}{path}") as response:
                    if response.status == 200 or time.monotonic() > end_s:
                        response.raise_for_status()
                        return await response.read()
                await asyncio.sleep(0.1)


@asynccontextmanager
async def running_chaos_stack(
    model: Path,
    store: Path,
    *,
    tenants: Sequence[ChaosTenant],
    experts: int,
    capacity: int,
    replicated_layers: str,
    router_fields: Mapping[str, Any],
    folder: Path,
    has_remote: bool = True,
) -> AsyncIterator[ChaosStack]:
    """Run all processes for the lifetime of the context.

    Args:
        model: checkpoint of the store.
        store: the store.
        tenants: the tenants of the model.
        experts: experts of one layer per function.
        capacity: functions per sandbox.
        replicated_layers: layers whose functions have two replicas, such as 0-3.
        router_fields: further fields of `spec.router`.
        folder: folder for the copy of the store, API keys and logs.
        has_remote: whether every second sandbox seems to be on another machine, from the start.
    """
    store_copy = folder / "copy"
    shutil.rmtree(store_copy, ignore_errors=True)
    shutil.copytree(store, store_copy)
    spec = {
        "model": {"source": f"file://{model}"},
        "granularity": {"expertsPerFunction": experts},
        "router": {**ROUTER_SPEC, **router_fields},
        "experts": {
            "device": "cpu",
            "functionsPerSandbox": capacity,
            "warmPool": 2,
            "scaling": {
                **{"minScale": 1, "maxScale": 3, "windowSeconds": 30},
                "overrides": [{"layers": replicated_layers, "minScale": 2}],
            },
        },
        "tenants": write_tenant_keys(tenants, folder),
    }
    router_model = _load_moemodel(folder / "router.yaml", {**spec, "store": {"path": str(store)}})
    control_model = _load_moemodel(
        folder / "control.yaml", {**spec, "store": {"path": str(store_copy)}}
    )
    async with AsyncExitStack() as stack:
        # In the temporary directory, because the path of a Unix socket is limited to 107 bytes.
        private_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        logs = stack.enter_context(LogSinks(folder / "logs"))
        port = ReservedControlPort.reserve()
        stack.callback(port.close)
        secrets = StackSecrets("chaos-token", os.urandom(32).hex())
        processes = _ProcessStarter(stack, private_dir, logs, port, secrets)
        proxy_sockets = private_dir / PROXY_SOCKET_DIR
        proxy_sockets.mkdir()
        proxy = ZygoteProxy(
            private_dir / "proxy.sock",
            private_dir / "zygote.sock",
            socket_dir=proxy_sockets,
            sandbox_socket_dir=private_dir / SANDBOX_SOCKET_DIR,
        )
        proxy.has_remote = has_remote
        zygote_child = await processes.zygote(store_copy)
        await proxy.open()
        stack.push_async_callback(proxy.close)
        control_child = await processes.control(control_model)
        await asyncio.to_thread(_verify, store, private_dir / ROUTER_VERIFIED_DIR)
        endpoint = router.Endpoint("127.0.0.1", free_port())
        behind = router.RouterSocket(private_dir / "router.sock", "chaos-front-token")
        router_child = await processes.start_router(router_model, endpoint, behind)
        await processes.start_gateway(router_model, endpoint, behind)
        await router.wait_until_healthy(endpoint, progress=print)
        await _wait_until_active(port.url, token=secrets.token)
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


def _verify(folder: Path, marker_dir: Path) -> None:
    """Verify all blocks of a store, and mark them for the processes that share a folder."""
    store, verified = Store.open(folder), VerifiedBlocks(marker_dir)
    for layer in store.manifest.layers:
        mapped, experts = store.map_layer(layer.index), range(layer.num_experts)
        BlockVerifier(store, layer, mapped, experts, verified_blocks=verified).verify_if_changed()


def _load_moemodel(file: Path, spec: Mapping[str, Any]) -> LocalModel:
    return LocalModel.load(write_moemodel(file, spec, name=MODEL_NAME))


@dataclass(frozen=True, slots=True)
class _ProcessStarter:
    """Starts processes that stop when `stack` is closed."""

    stack: AsyncExitStack
    private_dir: Path
    logs: LogSinks
    port: ReservedControlPort
    secrets: StackSecrets

    async def zygote(self, store: Path) -> SupervisedChild:
        return await self._supervised(
            "zygote",
            zygote.ZYGOTE_COMMAND,
            {
                **zygote.zygote_environment(
                    self.private_dir / "zygote.sock",
                    token=self.secrets.token,
                    store=store,
                    device="cpu",
                ),
                zygote.SOCKET_DIR_VARIABLE: str(self.private_dir / SANDBOX_SOCKET_DIR),
            },
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

    async def start_router(
        self, deployment: LocalModel, endpoint: router.Endpoint, behind: router.RouterSocket
    ) -> SupervisedChild:
        settings = router.environment(
            deployment,
            endpoint,
            control_url=self.port.url,
            token=self.secrets.token,
            tenants_file=write_tenants_file(deployment, self.private_dir),
            behind=behind,
        )
        socket_variables = {
            zygote.SOCKET_DIR_VARIABLE: str(self.private_dir / PROXY_SOCKET_DIR),
            zygote.VERIFIED_DIR_VARIABLE: str(self.private_dir / ROUTER_VERIFIED_DIR),
        }
        exact = {"FAASMOE_METRICS_MIN_TOKENS": "1"}  # calls are counted exactly
        environment, log = {**settings, **socket_variables, **exact}, self.logs.sink("router")
        router_zygote = await self.stack.enter_async_context(
            router.new_zygote(environment, log=self.logs.sink("router-zygote"))
        )
        child, _ = await self.stack.enter_async_context(
            supervised_start(
                "router",
                lambda: router_zygote.running_child(environment, log=log, grace_s=router.GRACE_S),
                restarts=RESTART_POLICY,
            )
        )
        return child

    async def start_gateway(
        self, deployment: LocalModel, endpoint: router.Endpoint, behind: router.RouterSocket
    ) -> SupervisedChild:
        listener = endpoint.listen()
        self.stack.callback(listener.close)
        descriptor = listener.fileno()
        environment = gateway.environment(deployment, endpoint, behind, listen_fd=descriptor)
        return await self._supervised(
            "gateway",
            gateway.COMMAND,
            environment,
            log="gateway",
            grace_s=gateway.GRACE_S,
            pass_fds=(descriptor,),
        )

    async def _supervised(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: str,
        grace_s: float,
        pass_fds: Sequence[int] = (),
    ) -> SupervisedChild:
        child, _ = await self.stack.enter_async_context(
            supervised(
                name,
                command,
                environment=environment,
                log=self.logs.sink(log),
                grace_s=grace_s,
                restarts=RESTART_POLICY,
                pass_fds=pass_fds,
            )
        )
        return child


async def _wait_until_active(url: str, *, token: str) -> None:
    """Wait until every function has a replica: an activation may take longer than requests wait."""
    end_s = time.monotonic() + ACTIVE_TIMEOUT_S
    while True:
        status = await control.fetch_status(url, token=token)
        if all(function["ready"] > 0 for function in status["functions"]):
            return
        assert time.monotonic() < end_s, "functions are not active"
        await asyncio.sleep(0.1)
