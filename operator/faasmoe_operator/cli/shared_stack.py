"""The processes of `faasmoe up` with several models: those of each model, and one gateway.

Each model has a zygote of sandboxes, a control process and a router of its own, which cannot reach
each other's sandboxes. All routers are forked by one zygote; the gateway chooses among them by the
request's `model`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Never

from faasmoe_contracts.store import Manifest
from faasmoe_operator.api.v1alpha1.tenants_file import TENANTS_FILE_NAME, build_tenants_file
from faasmoe_operator.cli import control, gateway, router
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.cli.local_stack import (
    ROUTER_SOCKET_NAME,
    SINGLE_TENANT,
    ClientAccess,
    StackSpec,
    router_environment,
    supervised_control,
    supervised_router,
    supervised_zygote,
    write_keys,
    write_private,
)
from faasmoe_operator.cli.logs import LogSinks, print_progress
from faasmoe_operator.cli.router_scaling import ScaledRouter, demand_listener, scaled_router
from faasmoe_operator.cli.supervisor import SupervisedChild, supervised
from faasmoe_operator.cli.zygote import Zygote
from faasmoe_operator.control.local_model import LocalModel

GATEWAY_FILE_NAME = "gateway.json"
DEMAND_SOCKET_NAME = "demand.sock"
DEFAULT_MODEL_LEN = 8192  # of a router whose model has a longer context


@dataclass(frozen=True, slots=True)
class SharedSpec:
    """Configuration of the processes.

    Attributes:
        deployment: models and tenants.
        specs: the processes of each model, by its name.
        max_model_lens: tokens of a prompt and its completion, by model.
        endpoint: address on which the gateway listens.
        access: who may call it, beside the tenants.
        folder: private runtime folder of the gateway.
        keep_alive_s: how long unused connections of clients are kept; None for the default.
    """

    deployment: Deployment
    specs: Mapping[str, StackSpec]
    max_model_lens: Mapping[str, int]
    endpoint: router.Endpoint
    access: ClientAccess
    folder: Path
    keep_alive_s: float | None

    @property
    def trace_variables(self) -> Mapping[str, str]:
        """Variables by which the gateway traces: those of the first model that does."""
        return next((s.trace_variables for s in self.specs.values() if s.trace_variables), {})

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """Origins of web pages that may call the API."""
        origins = [*self.access.cors_origins]
        for local in self.deployment.models.values():
            origins += local.model.spec.router.cors_origins
        return tuple(dict.fromkeys(origins))

    def router_socket(self, model: str) -> Path:
        """Return the socket of a model's router."""
        return self.specs[model].folder / ROUTER_SOCKET_NAME


@dataclass(frozen=True, slots=True)
class SharedProcesses:
    """The running processes.

    Attributes:
        routers: the router of each model; not restarted until `has_started` is set.
        children: all of them by name.
        failures: one task per process; it raises CommandError once the process is not restarted.
    """

    routers: Mapping[str, SupervisedChild | ScaledRouter]
    children: Mapping[str, SupervisedChild | ScaledRouter | Zygote]
    failures: tuple[asyncio.Task[Never], ...]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process ids by name; None while a process is being restarted."""
        return {name: child.pid for name, child in self.children.items()}


def max_model_len(local: LocalModel, manifest: Manifest) -> int:
    """Return the tokens of a prompt and its completion that a model's router takes."""
    context = min(manifest.model.max_position_embeddings, DEFAULT_MODEL_LEN)
    return local.model.spec.router.max_model_len or context


def with_api_keys(deployment: Deployment, access: ClientAccess, folder: Path) -> Deployment:
    """Return the deployment with a tenant that has the keys of the command line, if any."""
    if not access.api_keys:
        return deployment
    return deployment.with_key_tenant(SINGLE_TENANT, write_keys(folder, access.api_keys))


@asynccontextmanager
async def running_shared_stack(spec: SharedSpec, logs: LogSinks) -> AsyncIterator[SharedProcesses]:
    """Run all processes; the gateway stops first, so that its last requests can finish."""
    front_token = secrets.token_urlsafe(32)
    children: dict[str, SupervisedChild | ScaledRouter | Zygote] = {}
    routers: dict[str, SupervisedChild | ScaledRouter] = {}
    failures: list[asyncio.Task[Never]] = []
    async with AsyncExitStack() as stack:
        zygotes = _RouterZygotes(stack, logs)
        for name, model_spec in spec.specs.items():
            behind = router.RouterSocket(spec.router_socket(name), front_token)
            contexts = {
                "zygote": supervised_zygote(
                    model_spec, logs.sink(f"{name}-sandboxes"), name=f"zygote of {name}"
                ),
                "control": supervised_control(
                    model_spec, logs.sink(f"{name}-control"), name=f"control process of {name}"
                ),
            }
            for kind, context in contexts.items():
                children[f"{kind} of {name}"], failure = await stack.enter_async_context(context)
                failures.append(failure)
            environment = router_environment(model_spec, _write_tenants_file(spec, name), behind)
            router_zygote = await zygotes.get(environment)
            start = partial(
                supervised_router,
                environment,
                router_zygote,
                logs.sink(f"{name}-router"),
                name=f"router of {name}",
            )
            scaling = spec.deployment.models[name].model.spec.router.scaling
            if scaling is None:
                routers[name], failure = await stack.enter_async_context(start())
            else:
                routers[name], failure = await stack.enter_async_context(
                    scaled_router(scaling, start, f"the router of {name}")
                )
            children[f"router of {name}"] = routers[name]
            failures.append(failure)
        listener = spec.endpoint.listen()
        stack.callback(listener.close)
        sockets = {name: spec.router_socket(name) for name in spec.specs}
        scaled = {name: r for name, r in routers.items() if isinstance(r, ScaledRouter)}
        demand_socket = spec.folder / DEMAND_SOCKET_NAME if scaled else None
        if demand_socket is not None:
            await stack.enter_async_context(demand_listener(demand_socket, scaled))
        file = spec.folder / GATEWAY_FILE_NAME
        content = spec.deployment.gateway_file(sockets, spec.max_model_lens).dumps()
        write_private(file, content.decode())
        child, failure = await stack.enter_async_context(
            supervised(
                "gateway",
                gateway.COMMAND,
                environment=gateway.shared_environment(
                    file,
                    spec.endpoint,
                    front_token=front_token,
                    state_path=spec.deployment.state_path,
                    listen_fd=listener.fileno(),
                    demand_socket=demand_socket,
                    cors_origins=spec.cors_origins,
                    keep_alive_s=spec.keep_alive_s,
                    trace_variables=spec.trace_variables,
                ),
                log=logs.sink("gateway"),
                grace_s=gateway.GRACE_S,
                pass_fds=(listener.fileno(),),
            )
        )
        failures.append(failure)
        stack.callback(listener.close)  # before the gateway stops, which then refuses clients
        children = {"gateway": child, **children, **zygotes.by_name}
        yield SharedProcesses(routers, children, tuple(failures))


class _RouterZygotes:
    """The zygotes of routers: one for all that have the same variables for libraries.

    Args:
        stack: ends them.
        logs: their output.

    Attributes:
        by_name: the zygotes by name.
    """

    def __init__(self, stack: AsyncExitStack, logs: LogSinks) -> None:
        self.by_name: dict[str, Zygote] = {}
        self._stack = stack
        self._logs = logs
        self._zygotes: dict[frozenset[tuple[str, str]], Zygote] = {}

    async def get(self, environment: Mapping[str, str]) -> Zygote:
        """Return the zygote for a router's environment, of which only settings are its own."""
        key = frozenset(i for i in environment.items() if not i[0].startswith("FAASMOE_"))
        if key not in self._zygotes:
            name = "router zygote" + (f" {len(self._zygotes) + 1}" if self._zygotes else "")
            created = router.new_zygote(environment, log=self._logs.sink(name.replace(" ", "-")))
            self._zygotes[key] = await self._stack.enter_async_context(created)
            self.by_name[name] = created
        return self._zygotes[key]


async def wait_until_healthy(spec: SharedSpec, processes: SharedProcesses, name: str) -> None:
    """Wait until the control process and the router of a model are healthy."""
    await control.wait_until_healthy(spec.specs[name].port.url)
    await router.wait_until_healthy(
        spec.endpoint,
        progress=lambda message: print_progress(f"{name}: {message}"),
        socket_path=spec.router_socket(name),
    )
    processes.routers[name].has_started = True


def router_model(local: LocalModel) -> LocalModel:
    """Return the model as its router is told: what the gateway does for all is not its concern."""
    router_spec = local.model.spec.router.model_copy(update={"cors_origins": ()})
    spec = local.model.spec.model_copy(update={"router": router_spec})
    return replace(local, model=local.model.model_copy(update={"spec": spec}))


def _write_tenants_file(spec: SharedSpec, name: str) -> Path | None:
    """Write the tenants file of a model's router; None if everyone may use every model."""
    tenants = spec.deployment.tenants_of(name)
    if not tenants:
        return None
    local = spec.deployment.models[name]
    short_forms = tuple(tenant for tenant, _ in tenants)
    model_spec = local.model.spec.model_copy(update={"tenants": short_forms})
    model = local.model.model_copy(update={"spec": model_spec})
    keys = {tenant.name: path for tenant, path in tenants}
    document = build_tenants_file(model, lambda tenant: str(keys[tenant.name]))
    path = spec.specs[name].folder / TENANTS_FILE_NAME
    write_private(path, json.dumps(document, indent=2))
    return path
