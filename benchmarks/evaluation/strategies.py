"""The ways to serve six tenants that are compared, each as a context in which it serves.

All answer over the same HTTP API, by the same engine, from the same weights. They differ in where
experts are computed, in who shares a router, and in whether functions come and go.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baseline_tuning import DEFAULT_WAIT_POLICY
from benchmarks.evaluation import variables
from benchmarks.evaluation.client import TenantEndpoint
from benchmarks.evaluation.models import MODEL_NAME, BenchmarkModel
from benchmarks.evaluation.processes import (
    FULL_MODEL,
    UNREACHABLE_ADDRESS,
    router_environment,
    running_resident_sandbox,
    running_servers,
    unix_socket_environment,
    write_routing_table,
)
from benchmarks.up_process import running_up

from faasmoe_operator.cli import router
from faasmoe_operator.platforms.zygote import shared_dir_variables


@dataclass(frozen=True, slots=True)
class StrategySettings:
    """What a run gives its strategies.

    Attributes:
        model: what is served.
        tenants: how many.
        experts: settings of elastic sandboxes, in the MoEModel's words.
        experts_implementation: of full models, transformers' name, by requests in a batch.
        wait: how a single full model's threads wait for work.
    """

    model: BenchmarkModel
    tenants: int
    experts: Mapping[str, Any]
    experts_implementation: Callable[[int], str]
    wait_policy: str = DEFAULT_WAIT_POLICY


async def _no_wait() -> None:
    """Do nothing: a strategy that never goes idle has nothing to wait for."""


@dataclass(frozen=True, slots=True)
class StrategyDeployment:
    """A strategy that serves.

    Attributes:
        endpoints: where each tenant asks.
        roots: processes that it consists of, with all below them.
        control_url: address of its control API, if there is one.
        become_idle: waits until all that can go is gone.
    """

    endpoints: tuple[TenantEndpoint, ...]
    roots: tuple[int, ...]
    control_url: str | None = None
    wait_idle: Callable[[], Awaitable[object]] = _no_wait

    @property
    def router_urls(self) -> tuple[str, ...]:
        """Each server's address, once."""
        return tuple(dict.fromkeys(endpoint.url for endpoint in self.endpoints))


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to serve.

    Attributes:
        name: the key of its figures.
        title: what tables call it.
        deploy: gives it, serving.
    """

    name: str
    title: str
    deploy: Callable[[StrategySettings], AbstractAsyncContextManager[StrategyDeployment]]


@asynccontextmanager
async def full_model_per_tenant(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Serve with the whole model in a process of each tenant's own."""
    with _folder() as folder:
        # Several processes on the same cores: threads that wait by spinning steal from the others.
        environments = [
            _full_model_environment(settings, folder, batch=1, wait="PASSIVE")
            for _ in range(settings.tenants)
        ]
        async with running_servers(FULL_MODEL, environments) as found:
            yield StrategyDeployment(tuple(s.endpoint for s in found), tuple(s.pid for s in found))


@asynccontextmanager
async def full_model_shared(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Serve with the whole model in one process for all tenants."""
    with _folder() as folder:
        environment = _full_model_environment(
            settings, folder, batch=settings.tenants, wait=settings.wait_policy
        )
        async with running_servers(FULL_MODEL, [environment]) as (server,):
            yield StrategyDeployment((server.endpoint,) * settings.tenants, (server.pid,))


@asynccontextmanager
async def local_distribution(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Serve with a router for each tenant, and all experts in one process that stays."""
    with _folder() as folder:
        deployment = settings.model.deployment(folder, {"placement": "functions"})
        async with running_resident_sandbox(deployment, folder) as resident:
            environments = [
                router_environment(deployment, table=resident.table, token=resident.token)
                | shared_dir_variables(folder)
                for _ in range(settings.tenants)
            ]
            async with running_servers(router.COMMAND, environments) as found:
                pids = (resident.pid, *(server.pid for server in found))
                yield StrategyDeployment(tuple(server.endpoint for server in found), pids)


@asynccontextmanager
async def functions_private(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Serve with `faasmoe up`, and a router more for each further tenant."""
    with _folder() as folder:
        deployment = settings.model.deployment(folder, settings.experts)
        async with running_up(deployment.file) as up:
            near = unix_socket_environment(up.launcher.pid)
            token = str(up.http.headers["Authorization"]).removeprefix("Bearer ")
            environments = [
                router_environment(deployment, control_url=up.control_url, token=token) | near
                for _ in range(settings.tenants - 1)
            ]
            async with running_servers(router.COMMAND, environments) as others:
                yield StrategyDeployment(
                    (TenantEndpoint(up.url, MODEL_NAME), *(server.endpoint for server in others)),
                    (up.launcher.pid, *(server.pid for server in others)),
                    up.control_url,
                    up.wait_idle,
                )


@asynccontextmanager
async def functions_shared(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Serve with `faasmoe up`, as it is."""
    with _folder() as folder:
        deployment = settings.model.deployment(folder, settings.experts)
        async with running_up(deployment.file) as up:
            endpoints = (TenantEndpoint(up.url, MODEL_NAME),) * settings.tenants
            yield StrategyDeployment(endpoints, (up.launcher.pid,), up.control_url, up.wait_idle)


FULL_MODEL_PER_TENANT = "full-model-per-tenant"
FULL_MODEL_SHARED = "full-model-shared"
LOCAL_DISTRIBUTION = "local-distribution"
FUNCTIONS_SHARED = "functions-shared"
STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(FULL_MODEL_PER_TENANT, "full model per tenant", full_model_per_tenant),
        Strategy(FULL_MODEL_SHARED, "one shared full model", full_model_shared),
        Strategy(LOCAL_DISTRIBUTION, "local distribution", local_distribution),
        Strategy("functions-private", "functions, router per tenant", functions_private),
        Strategy(FUNCTIONS_SHARED, "functions, shared router (ours)", functions_shared),
    )
}


def _full_model_environment(
    settings: StrategySettings, folder: Path, *, batch: int, wait: str
) -> dict[str, str]:
    deployment = settings.model.deployment(folder)
    environment = router_environment(
        deployment, table=write_routing_table(deployment, UNREACHABLE_ADDRESS, folder)
    )
    environment |= {
        variables.CHECKPOINT: str(settings.model.checkpoint),
        variables.EXPERTS: settings.experts_implementation(batch),
    }
    if wait == DEFAULT_WAIT_POLICY and "OMP_WAIT_POLICY" not in os.environ:
        del environment["OMP_WAIT_POLICY"]
    elif wait != DEFAULT_WAIT_POLICY:
        environment["OMP_WAIT_POLICY"] = wait
    return environment


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        yield Path(folder)
