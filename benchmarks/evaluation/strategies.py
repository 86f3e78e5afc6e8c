"""The compared strategies, each as a context manager that deploys it.

All use the same HTTP API, engine and weights. They differ in where experts are computed, in whether
tenants share a router, and in whether functions scale.
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
    """Settings of all strategies of a run.

    Attributes:
        model: the model.
        tenants: number of tenants.
        experts: fields of spec.experts for strategies with functions that scale.
        experts_implementation: returns the experts implementation of full models for a batch size.
        wait_policy: OMP_WAIT_POLICY of a shared full model.
    """

    model: BenchmarkModel
    tenants: int
    experts: Mapping[str, Any]
    experts_implementation: Callable[[int], str]
    wait_policy: str = DEFAULT_WAIT_POLICY


async def _no_wait() -> None:
    """Return at once: the strategy does not scale."""


@dataclass(frozen=True, slots=True)
class StrategyDeployment:
    """A deployed strategy.

    Attributes:
        endpoints: endpoint of each tenant.
        roots: process ids whose trees make up the strategy.
        control_url: base URL of the control API; None without one.
        wait_idle: waits until all functions have scaled down.
    """

    endpoints: tuple[TenantEndpoint, ...]
    roots: tuple[int, ...]
    control_url: str | None = None
    wait_idle: Callable[[], Awaitable[object]] = _no_wait

    @property
    def router_urls(self) -> tuple[str, ...]:
        """Base URLs of the servers without duplicates."""
        return tuple(dict.fromkeys(endpoint.url for endpoint in self.endpoints))


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy.

    Attributes:
        name: key in the figures and on the command line.
        title: label in tables.
        deploy: deploys it for the lifetime of a context.
    """

    name: str
    title: str
    deploy: Callable[[StrategySettings], AbstractAsyncContextManager[StrategyDeployment]]


@asynccontextmanager
async def full_model_per_tenant(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Run one full model per tenant."""
    with _folder() as folder:
        # Spinning OpenMP threads would take CPU time from the other processes.
        environments = [
            _full_model_environment(settings, folder, batch=1, wait="PASSIVE")
            for _ in range(settings.tenants)
        ]
        async with running_servers(FULL_MODEL, environments) as servers:
            yield StrategyDeployment(
                tuple(server.endpoint for server in servers),
                tuple(server.pid for server in servers),
            )


@asynccontextmanager
async def full_model_shared(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Run one full model for all tenants."""
    with _folder() as folder:
        environment = _full_model_environment(
            settings, folder, batch=settings.tenants, wait=settings.wait_policy
        )
        async with running_servers(FULL_MODEL, [environment]) as (server,):
            yield StrategyDeployment((server.endpoint,) * settings.tenants, (server.pid,))


@asynccontextmanager
async def local_distribution(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Run one router per tenant, and all experts in one resident sandbox."""
    with _folder() as folder:
        deployment = settings.model.deployment(folder, {"placement": "functions"})
        async with running_resident_sandbox(deployment, folder) as resident:
            environments = [
                router_environment(deployment, table=resident.table, token=resident.token)
                | shared_dir_variables(folder)
                for _ in range(settings.tenants)
            ]
            async with running_servers(router.COMMAND, environments) as servers:
                pids = (resident.pid, *(server.pid for server in servers))
                yield StrategyDeployment(tuple(server.endpoint for server in servers), pids)


@asynccontextmanager
async def functions_private(settings: StrategySettings) -> AsyncIterator[StrategyDeployment]:
    """Run `faasmoe up` and one additional router for each further tenant."""
    with _folder() as folder:
        deployment = settings.model.deployment(folder, settings.experts)
        async with running_up(deployment.file) as up:
            sockets = unix_socket_environment(up.launcher.pid)
            token = str(up.http.headers["Authorization"]).removeprefix("Bearer ")
            environments = [
                router_environment(deployment, control_url=up.control_url, token=token) | sockets
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
    """Run `faasmoe up` with one router for all tenants."""
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
