"""The processes of `faasmoe up` with several models: their routers, and what they share.

One control process and one zygote of sandboxes, for each device, serve all models: any generic
sandbox takes any model's functions. All routers are forked by one zygote; the gateway chooses among
them by the request's `model`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Never

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_contracts.store import Manifest, StoreError
from faasmoe_operator.api.v1alpha1.tenants_file import TENANTS_FILE_NAME, build_tenants_file
from faasmoe_operator.cli import control, gateway, live_page, router
from faasmoe_operator.cli.child_process import RunChild
from faasmoe_operator.cli.common_zygote import CommonZygote
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.cli.formatting import format_bytes
from faasmoe_operator.cli.live_page import LivePageOptions
from faasmoe_operator.cli.local_stack import (
    ClientAccess,
    SharedControl,
    StackSpec,
    SupervisedContext,
    new_common_zygote,
    router_environment,
    supervised_router,
    supervised_zygote,
)
from faasmoe_operator.cli.logs import LogSinks, print_progress
from faasmoe_operator.cli.router_memory import limit_routers
from faasmoe_operator.cli.router_scaling import (
    RouterSlot,
    ScaledRouters,
    scaled_routers,
)
from faasmoe_operator.cli.stack_files import (
    SINGLE_TENANT,
    write_keys,
    write_model_file,
    write_private,
)
from faasmoe_operator.cli.supervisor import SupervisedChild, supervised
from faasmoe_operator.cli.zygote import Zygote
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.models_file import ModelsFile, ServedModel
from faasmoe_operator.control.router_scaler import RouterScaler
from faasmoe_operator.errors import CommandError
from faasmoe_operator.plan.functions import function_bytes
from faasmoe_operator.plan.router_size import PROCESS_BYTES, RouterSize
from faasmoe_operator.plan.router_weights import router_weights_bytes, widest_router_dtype

GATEWAY_FILE_NAME = "gateway.json"
MODELS_FILE_NAME = "models.json"
DEMAND_SOCKET_NAME = "demand.sock"
LEASE_SOCKET_NAME = "leases.sock"
ROUTER_NICENESS = 10  # of one that has started, which leaves processors to those that start
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
        shared: what the models share.
        keep_alive_s: how long unused connections of clients are kept; None for the default.
        memory_bytes: memory of all functions and routers together; None for no limit.
        live_page: the page that the gateway forwards to; None for none.
        n_gateways: gateways that accept clients.
        separate_sandboxes: whether each model has sandboxes of its own.
    """

    deployment: Deployment
    specs: Mapping[str, StackSpec]
    max_model_lens: Mapping[str, int]
    endpoint: router.Endpoint
    access: ClientAccess
    shared: SharedControl
    keep_alive_s: float | None
    memory_bytes: int | None = None
    live_page: LivePageOptions | None = None
    n_gateways: int = 1
    separate_sandboxes: bool = False

    @property
    def lease_socket(self) -> Path | None:
        """Where gateways lease tokens of limits; None if there is only one."""
        return self.folder / LEASE_SOCKET_NAME if self.n_gateways > 1 else None

    @property
    def gateway_file(self) -> Path:
        """The file of models and tenants."""
        return self.folder / GATEWAY_FILE_NAME

    @property
    def folder(self) -> Path:
        """The private runtime folder of what the models share."""
        return self.shared.folder

    @property
    def zygote_sockets(self) -> dict[str, Path]:
        """The sockets of the zygotes, by the device of their sandboxes."""
        devices = (spec.deployment.template.device for spec in self.specs.values())
        names = {device: f"zygote-{device}.sock" for device in devices}
        return {device: self.folder / name for device, name in names.items()}

    @property
    def models_file(self) -> ModelsFile:
        """What the control process reads."""
        sockets = self.zygote_sockets
        models = (
            ServedModel(
                name,
                write_model_file(spec.deployment, spec.folder),
                bytes.fromhex(spec.secrets.function_key),
                sockets[spec.deployment.template.device],
            )
            for name, spec in self.specs.items()
        )
        return ModelsFile(
            tuple(models), self.memory_bytes, separate_sandboxes=self.separate_sandboxes
        )

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

    def router_sockets(self, model: str) -> list[Path]:
        """Return the sockets of a model's routers, the first one's first."""
        scaling = self.deployment.models[model].model.spec.router.scaling
        folder, count = self.specs[model].folder, 1 if scaling is None else scaling.max_replicas
        return [folder / f"router-{index}.sock" for index in range(count)]


@dataclass(frozen=True, slots=True)
class SharedProcesses:
    """The running processes.

    Attributes:
        routers: the routers of each model.
        children: all other processes by name.
        failures: one task per process; it raises CommandError once the process is not restarted.
    """

    routers: Mapping[str, ScaledRouters]
    children: Mapping[str, SupervisedChild | Zygote | CommonZygote]
    failures: tuple[asyncio.Task[Never], ...]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process ids by name; None while a process does not run."""
        pids = {name: child.pid for name, child in self.children.items()}
        for model, routers in self.routers.items():
            for slot in routers.slots:
                number = f" ({slot.name})" if len(routers.slots) > 1 else ""
                pids[f"router{number} of {model}"] = slot.pid
        return pids


def max_model_len(local: LocalModel, manifest: Manifest) -> int:
    """Return the tokens of a prompt and its completion that a model's router takes."""
    context = min(manifest.model.max_position_embeddings, DEFAULT_MODEL_LEN)
    return local.model.spec.router.max_model_len or context


def check_memory(spec: SharedSpec) -> None:
    """Check that each model alone fits within the memory limit, if there is one.

    Raises:
        MoEModelError: a model's router, with its largest function, needs more.
    """
    if spec.memory_bytes is None:
        return
    always_bytes = 0
    for name, model_spec in spec.specs.items():
        local = model_spec.deployment
        least_bytes = router_bytes(local) + _largest_function_bytes(model_spec)
        if least_bytes > spec.memory_bytes:
            expected = f"{format_bytes(least_bytes)} or more, for a router and its largest function"
            raise local.error(
                f"--memory: got {format_bytes(spec.memory_bytes)}, expected {expected}"
            )
        scaling = local.model.spec.router.scaling
        n_always = 1 if scaling is None else scaling.min_replicas
        always_bytes += n_always * router_bytes(local)
        if n_always:
            print_progress(f"{name}: its router never ends, as router.scaling.minReplicas is not 0")
    if always_bytes > spec.memory_bytes:
        got = format_bytes(spec.memory_bytes)
        expected = f"{format_bytes(always_bytes)} or more, for the routers that never end"
        raise CommandError(f"--memory: got {got}, expected {expected}", exit_status=2)


def _largest_function_bytes(spec: StackSpec) -> int:
    local, key = spec.deployment, bytes.fromhex(spec.secrets.function_key)
    manifest = local.open_store().manifest
    functions = local.functions(manifest, key=key)
    return max(function_bytes(function, manifest.layers) for function in functions)


def with_api_keys(deployment: Deployment, access: ClientAccess, folder: Path) -> Deployment:
    """Return the deployment with a tenant that has the keys of the command line, if any."""
    if not access.api_keys:
        return deployment
    return deployment.with_key_tenant(SINGLE_TENANT, write_keys(folder, access.api_keys))


@asynccontextmanager
async def running_shared_stack(spec: SharedSpec, logs: LogSinks) -> AsyncIterator[SharedProcesses]:
    """Run all processes; the gateway stops first, so that its last requests can finish."""
    front_token = secrets.token_urlsafe(32)
    children: dict[str, SupervisedChild | Zygote | CommonZygote] = {}
    failures: list[asyncio.Task[Never]] = []
    async with AsyncExitStack() as stack:
        sockets = {name: spec.router_sockets(name) for name in spec.specs}
        file = spec.deployment.gateway_file(sockets, spec.max_model_lens)
        write_private(spec.gateway_file, file.dumps().decode())
        common_zygote = await stack.enter_async_context(
            new_common_zygote(next(iter(spec.specs.values())), logs)
        )
        zygotes = _RouterZygotes(stack, logs, run=common_zygote.running_child)
        contexts = _shared_contexts(spec, logs, run=common_zygote.running_child)
        for kind, context in contexts.items():
            children[kind], failure = await stack.enter_async_context(context)
            failures.append(failure)
        links = GatewayLinks()
        routers = {}
        for name in spec.specs:
            tenants_file = _write_tenants_file(spec, name)
            slots = await _router_slots(
                spec, name, tenants_file, zygotes, logs, front_token=front_token
            )
            wake = partial(
                control.warm_up, spec.shared.port.url, token=spec.shared.token, model=name
            )
            group = ScaledRouters(
                name,
                _router_scaler(spec, name),
                slots,
                links,
                on_wake=wake,
                on_running=partial(write_router_count, tenants_file),
            )
            routers[name], failure = await stack.enter_async_context(scaled_routers(group))
            failures.append(failure)
        if spec.memory_bytes is not None:
            limiter = limit_routers(routers.values(), spec.shared.port.url, spec.shared.token)
            failures.append(asyncio.create_task(limiter))
            stack.push_async_callback(_cancelled, failures[-1])
        listener = spec.endpoint.listen()
        stack.callback(listener.close)
        demand_socket = spec.folder / DEMAND_SOCKET_NAME
        await stack.enter_async_context(links.listening(demand_socket))
        gateways = {}
        for index in range(spec.n_gateways):
            name = f"gateway {index}" if index else "gateway"
            gateways[name], failure = await stack.enter_async_context(
                _supervised_gateway(
                    spec, logs, listener, demand_socket, front_token=front_token, index=index
                )
            )
            failures.append(failure)
        stack.callback(listener.close)  # before gateways stop, which then refuse clients
        children |= {**zygotes.by_name, "common zygote": common_zygote}
        children = {**gateways, **children}
        yield SharedProcesses(routers, children, tuple(failures))


async def _cancelled(task: asyncio.Task[Never]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _supervised_gateway(
    spec: SharedSpec,
    logs: LogSinks,
    listener: socket.socket,
    demand_socket: Path,
    *,
    front_token: str,
    index: int,
) -> SupervisedContext:
    suffix = f"-{index}" if index else ""
    return supervised(
        f"gateway{suffix}",
        gateway.COMMAND,
        environment=gateway.shared_environment(
            spec.gateway_file,
            spec.endpoint,
            front_token=front_token,
            state_path=spec.deployment.state_path,
            listen_fd=listener.fileno(),
            demand_socket=demand_socket,
            cors_origins=spec.cors_origins,
            keep_alive_s=spec.keep_alive_s,
            page_socket=spec.folder / live_page.SOCKET_NAME if spec.live_page else None,
            lease_socket=spec.lease_socket,
            index=index,
            trace_variables=spec.trace_variables,
        ),
        log=logs.sink(f"gateway{suffix}"),
        grace_s=gateway.GRACE_S,
        pass_fds=(listener.fileno(),),
    )


def _router_scaler(spec: SharedSpec, model: str) -> RouterScaler:
    router_spec = spec.deployment.models[model].model.spec.router
    return RouterScaler(router_spec.scaling, router_spec.max_num_seqs, time.time())


async def _router_slots(
    spec: SharedSpec,
    model: str,
    tenants_file: Path | None,
    zygotes: _RouterZygotes,
    logs: LogSinks,
    *,
    front_token: str,
) -> list[RouterSlot]:
    """Return the routers of a model, none of which runs yet."""
    model_spec = spec.specs[model]
    slots = []
    for index, path in enumerate(spec.router_sockets(model)):
        behind = router.RouterSocket(path, front_token, index)
        environment = router_environment(model_spec, tenants_file, behind)
        if len(spec.specs) > 1:
            environment.setdefault("FAASMOE_NICENESS", str(ROUTER_NICENESS))
        suffix = f"-{index}" if index else ""
        start = partial(
            supervised_router,
            environment,
            await zygotes.get(environment),
            logs.sink(f"{model}-router{suffix}"),
            name=f"router{suffix} of {model}",
        )
        healthy = partial(
            router.wait_until_healthy,
            spec.endpoint,
            progress=partial(_print_router_progress, model),
            socket_path=path,
        )
        size = RouterSize(
            _router_weights(model_spec.deployment), _router_content(model_spec.deployment)
        )
        may_run = spec.memory_bytes is None
        slots.append(RouterSlot(index, start, healthy, size=size, may_run=may_run))
    return slots


def write_router_count(tenants_file: Path | None, n_routers: int) -> None:
    """Tell the routers of a model over how many of them its tenants' concurrency is split."""
    if tenants_file is None or n_routers < 1:
        return
    document = json.loads(tenants_file.read_text())
    document["routerReplicas"] = n_routers
    write_atomically(tenants_file, json.dumps(document, indent=2).encode(), 0o600)


def _print_router_progress(model: str, message: str) -> None:
    print_progress(f"{model}: {message}")


def router_bytes(local: LocalModel) -> int:
    """Return about the memory of a model's router, until it is measured."""
    return _router_weights(local) + PROCESS_BYTES


def _router_weights(local: LocalModel) -> int:
    manifest, spec = local.open_store().manifest, local.model.spec.router
    store_dtype = manifest.model.dtype
    return router_weights_bytes(
        manifest.router_bytes,
        store_dtype=store_dtype,
        dtype=widest_router_dtype(spec.dtype, spec.device, store_dtype=store_dtype),
        quantized_bytes=manifest.router.quantized_bytes,
    )


def _router_content(local: LocalModel) -> str:
    """Return a name of the files that a router maps: by inode, of a hard link that of all."""
    store = local.open_store()
    try:
        files = [path.stat() for path in (*store.router_files(), *store.router_reference_paths())]
    except (StoreError, OSError):  # which the router will report
        return ""
    return " ".join(f"{file.st_dev}:{file.st_ino}" for file in files)


def _shared_contexts(
    spec: SharedSpec, logs: LogSinks, *, run: RunChild
) -> dict[str, SupervisedContext]:
    """Return the zygotes of sandboxes and the control process, in the order of their start.

    Args:
        spec: the models and their processes.
        logs: their output.
        run: runs the zygotes.
    """
    contexts = {}
    by_device = {s.deployment.template.device: s for s in spec.specs.values()}
    for device, path in spec.zygote_sockets.items():
        kind = "zygote" if len(by_device) == 1 else f"zygote of {device}"
        log = logs.sink("sandboxes" if len(by_device) == 1 else f"sandboxes-{device}")
        contexts[kind] = supervised_zygote(by_device[device], path, log, run=run, name=kind)
    file = spec.folder / MODELS_FILE_NAME
    write_private(file, spec.models_file.dumps())
    contexts["control"] = supervised(
        "control process",
        control.COMMAND,
        environment=control.shared_environment(
            file,
            port=spec.shared.port,
            token=spec.shared.token,
            gateway_file=spec.gateway_file,
            lease_socket=spec.lease_socket,
            page_variables=(
                spec.live_page.control_variables(spec.folder) if spec.live_page else None
            ),
            trace_variables=spec.trace_variables,
        ),
        log=logs.sink("control"),
        grace_s=control.GRACE_S,
    )
    return contexts


class _RouterZygotes:
    """The zygotes of routers: one for all of an engine that have the same variables for libraries.

    Args:
        stack: ends them.
        logs: their output.
        run: runs them.

    Attributes:
        by_name: the zygotes by name.
    """

    def __init__(self, stack: AsyncExitStack, logs: LogSinks, *, run: RunChild) -> None:
        self.by_name: dict[str, Zygote] = {}
        self._stack = stack
        self._logs = logs
        self._run = run
        self._zygotes: dict[Hashable, Zygote] = {}

    async def get(self, environment: Mapping[str, str]) -> Zygote:
        """Return the zygote for a router's environment, of which only settings are its own."""
        key = router.zygote_key(environment)
        if key not in self._zygotes:
            name = "router zygote" + (f" {len(self._zygotes) + 1}" if self._zygotes else "")
            log = self._logs.sink(name.replace(" ", "-"))
            created = router.new_zygote(environment, log=log, run=self._run)
            self._zygotes[key] = await self._stack.enter_async_context(created)
            self.by_name[name] = created
        return self._zygotes[key]


async def wait_until_healthy(spec: SharedSpec, processes: SharedProcesses, name: str) -> None:
    """Wait until the control process and a router of a model have been healthy once."""
    await control.wait_until_healthy(spec.shared.port.url)
    await processes.routers[name].has_started.wait()


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
    document = build_tenants_file(
        model.metadata.name, model.spec.tenants, lambda tenant: str(keys[tenant.name])
    )
    path = spec.specs[name].folder / TENANTS_FILE_NAME
    write_private(path, json.dumps(document, indent=2))
    return path
