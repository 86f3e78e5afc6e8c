"""The processes of one `faasmoe up`: zygotes, control process, router and gateway.

This module knows their environments and the order in which they start and stop. All are supervised:
one that exits is restarted, with back-off. The launcher listens for the gateway and passes it the
socket; the gateway keeps requests and streams while the router is being restarted. Without a
gateway the router gets the socket, in whose queue clients wait meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Never

from faasmoe_operator.cli import control, gateway, live_page, router
from faasmoe_operator.cli.child_process import RunChild
from faasmoe_operator.cli.common_zygote import CommonZygote
from faasmoe_operator.cli.control import ReservedControlPort, StackSecrets
from faasmoe_operator.cli.live_page import LivePageOptions
from faasmoe_operator.cli.logs import LogSinks
from faasmoe_operator.cli.runtime_dir import LocalInstance
from faasmoe_operator.cli.stack_files import write_model_file, write_tenants_file
from faasmoe_operator.cli.supervisor import SupervisedChild, supervised, supervised_start
from faasmoe_operator.cli.zygote import Zygote
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.models_file import LOCAL_NAMESPACE
from faasmoe_operator.errors import CommandError
from faasmoe_operator.platforms import zygote

ZYGOTE_GRACE_S = 10.0
SOCKET_NAME = "zygote.sock"
ROUTER_SOCKET_NAME = "router.sock"

SupervisedContext = AbstractAsyncContextManager[tuple[SupervisedChild, asyncio.Task[Never]]]


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """Who may call the API, as given on the command line.

    Attributes:
        api_keys: the accepted API keys; empty leaves that to the model's tenants.
        cors_origins: origins of web pages that may call the API, beside those of the file.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def check(self, deployment: LocalModel) -> None:
        """Raise CommandError if a key is invalid, or the model's tenants have keys already."""
        if any(not key.isprintable() or " " in key or not key for key in self.api_keys):
            raise CommandError(
                "--api-key: got a key with spaces or none, expected one word", exit_status=2
            )
        if self.api_keys and deployment.model.spec.tenants:
            raise CommandError(
                f"--api-key: {deployment.file} has spec.tenants, whose keys are in apiKeysPath",
                exit_status=2,
            )


@dataclass(frozen=True, slots=True)
class SharedControl:
    """What several models share: control process and sandboxes.

    Attributes:
        folder: private runtime folder, where the zygotes are.
        port: port of the control API.
        token: bearer token of the sandboxes and the control API.
    """

    folder: Path
    port: ReservedControlPort
    token: str


@dataclass(frozen=True, slots=True)
class StackSpec:
    """Configuration of the processes.

    Attributes:
        deployment: the model to serve.
        endpoint: address on which the router listens.
        access: who may call it.
        folder: private runtime folder of this instance.
        port: port of the control API.
        secrets: secrets shared by the processes.
        keep_alive_s: how long unused connections of clients are kept; None for the default.
        has_gateway: whether clients talk to a gateway.
        live_page: the page that it forwards to; None for none.
        trace_variables: environment variables by which the processes trace.
        shared: what it shares with other models; None if it is the only one.
    """

    deployment: LocalModel
    endpoint: router.Endpoint
    access: ClientAccess
    folder: Path
    port: ReservedControlPort
    secrets: StackSecrets
    keep_alive_s: float | None = None
    has_gateway: bool = False
    live_page: LivePageOptions | None = None
    trace_variables: Mapping[str, str] = field(default_factory=dict)
    shared: SharedControl | None = None

    @classmethod
    def create(
        cls,
        deployment: LocalModel,
        endpoint: router.Endpoint,
        *,
        access: ClientAccess,
        folder: Path,
        port: ReservedControlPort,
        keep_alive_s: float | None = None,
        has_gateway: bool = False,
        live_page: LivePageOptions | None = None,
        trace_variables: Mapping[str, str] | None = None,
    ) -> StackSpec:
        """Return a configuration with newly generated secrets."""
        secret_values = StackSecrets(secrets.token_urlsafe(32), secrets.token_hex(32))
        return cls(
            deployment,
            endpoint,
            access,
            folder,
            port,
            secret_values,
            keep_alive_s,
            has_gateway,
            live_page,
            trace_variables or {},
        )

    @classmethod
    def of_several(
        cls,
        deployment: LocalModel,
        endpoint: router.Endpoint,
        *,
        folder: Path,
        shared: SharedControl,
        trace_variables: Mapping[str, str],
    ) -> StackSpec:
        """Return the configuration of one of several models."""
        keys = StackSecrets(shared.token, secrets.token_hex(32))
        access = ClientAccess()
        return cls(
            deployment,
            endpoint,
            access,
            folder,
            shared.port,
            keys,
            has_gateway=True,
            trace_variables=trace_variables,
            shared=shared,
        )

    @property
    def control_url(self) -> str:
        """Base URL of the model's control API."""
        if self.shared is None:
            return self.port.url
        return f"{self.port.url}/models/{LOCAL_NAMESPACE}/{self.deployment.model.metadata.name}"

    @property
    def sandbox_folder(self) -> Path:
        """The folder by which its router reaches sandboxes."""
        return self.folder if self.shared is None else self.shared.folder

    @property
    def instance(self) -> LocalInstance:
        """The entry by which other commands find this instance."""
        name, file = self.deployment.model.metadata.name, self.deployment.file.resolve()
        return LocalInstance(
            name,
            str(file),
            os.getpid(),
            self.control_url,
            self.secrets.token,
            url=self.endpoint.url,
            served_name=self.deployment.served_model_name,
            metrics_url=self._metrics_url,
        )

    @property
    def _metrics_url(self) -> str:
        """URL of the router's metrics; empty behind a gateway of several models."""
        port = self.deployment.model.spec.router.metrics_port
        if port is not None:
            return f"{replace(self.endpoint, port=port).url}/metrics"
        return "" if self.shared is not None else f"{self.endpoint.url}/metrics"


@dataclass(frozen=True, slots=True)
class StackProcesses:
    """The running processes.

    Attributes:
        common_zygote: forks the zygotes.
        zygote: forks the sandboxes.
        router_zygote: forks the router.
        control: plans and scales the functions.
        router: serves the OpenAI API; not restarted until `has_started` is set.
        gateway: what clients talk to; None without one.
        failures: one task per process; it raises CommandError once the process is not restarted.
    """

    common_zygote: CommonZygote
    zygote: SupervisedChild
    router_zygote: Zygote
    control: SupervisedChild
    router: SupervisedChild
    gateway: SupervisedChild | None
    failures: tuple[asyncio.Task[Never], ...]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process ids by name; None while a process is being restarted."""
        front = {} if self.gateway is None else {"gateway": self.gateway.pid}
        return {
            **front,
            "router": self.router.pid,
            "control": self.control.pid,
            "router zygote": self.router_zygote.pid,
            "zygote": self.zygote.pid,
            "common zygote": self.common_zygote.pid,
        }


@asynccontextmanager
async def running_stack(spec: StackSpec, logs: LogSinks) -> AsyncIterator[StackProcesses]:
    """Run all processes; the router stops first, so that its last requests can finish."""
    async with AsyncExitStack() as stack:
        common_zygote = await stack.enter_async_context(new_common_zygote(spec, logs))
        zygote_child, zygote_failure = await stack.enter_async_context(
            supervised_zygote(
                spec,
                spec.folder / SOCKET_NAME,
                logs.sink("sandboxes"),
                run=common_zygote.running_child,
            )
        )
        control_child, control_failure = await stack.enter_async_context(
            supervised_control(spec, logs.sink("control"))
        )
        listener = spec.endpoint.listen()
        stack.callback(listener.close)
        behind = None
        if spec.has_gateway:
            path = spec.folder / ROUTER_SOCKET_NAME
            behind = router.RouterSocket(path, secrets.token_urlsafe(32))
        router_zygote, router_child, router_failure = await stack.enter_async_context(
            _supervised_router(spec, logs, common_zygote, listener, behind)
        )
        failures = [zygote_failure, control_failure, router_failure]
        gateway_child = None
        if behind is not None:
            gateway_child, gateway_failure = await stack.enter_async_context(
                _supervised_gateway(spec, logs, listener, behind)
            )
            failures.append(gateway_failure)
        stack.callback(listener.close)  # before the front stops, which then refuses clients
        yield StackProcesses(
            common_zygote,
            zygote_child,
            router_zygote,
            control_child,
            router_child,
            gateway_child,
            tuple(failures),
        )


def new_common_zygote(spec: StackSpec, logs: LogSinks) -> CommonZygote:
    """Return the parent of the zygotes.

    Args:
        spec: a model; routers of others may have other variables, and then other zygotes.
        logs: its output.
    """
    environment = router.zygote_environment(router_environment(spec, None, None))
    return CommonZygote(environment, log=logs.sink("common-zygote"))


def supervised_zygote(
    spec: StackSpec,
    socket_path: Path,
    log: Callable[[str], None],
    *,
    run: RunChild,
    name: str = "zygote",
) -> SupervisedContext:
    """Keep a zygote of sandboxes running.

    Args:
        spec: a model, with which it warms up.
        socket_path: its Unix socket.
        log: called with each line of output.
        run: runs it.
        name: its name for messages.
    """
    return supervised(
        name,
        zygote.ZYGOTE_COMMAND,
        environment=zygote.zygote_environment(
            socket_path,
            token=spec.secrets.token,
            store=spec.deployment.store_path,
            device=spec.deployment.template.device,
        ),
        log=log,
        grace_s=ZYGOTE_GRACE_S,
        run=run,
    )


def supervised_control(spec: StackSpec, log: Callable[[str], None]) -> SupervisedContext:
    """Keep the control process of a model running."""
    return supervised(
        "control process",
        control.COMMAND,
        environment=control.environment(
            write_model_file(spec.deployment, spec.folder),
            zygote_socket=spec.folder / SOCKET_NAME,
            port=spec.port,
            secrets=spec.secrets,
            page_variables=(
                spec.live_page.control_variables(spec.folder) if spec.live_page else None
            ),
            trace_variables=spec.trace_variables,
        ),
        log=log,
        grace_s=control.GRACE_S,
    )


@asynccontextmanager
async def _supervised_router(
    spec: StackSpec,
    logs: LogSinks,
    common_zygote: CommonZygote,
    listener: socket.socket,
    behind: router.RouterSocket | None,
) -> AsyncIterator[tuple[Zygote, SupervisedChild, asyncio.Task[Never]]]:
    inherited = listener if behind is None else None
    tenants_file = write_tenants_file(spec.deployment, spec.folder, api_keys=spec.access.api_keys)
    environment = router_environment(spec, tenants_file, behind, listener=inherited)
    log, run = logs.sink("router"), common_zygote.running_child
    async with (
        router.new_zygote(environment, log=logs.sink("router-zygote"), run=run) as router_zygote,
        supervised_router(environment, router_zygote, log, listener=inherited) as (child, failure),
    ):
        yield router_zygote, child, failure


def router_environment(
    spec: StackSpec,
    tenants_file: Path | None,
    behind: router.RouterSocket | None,
    *,
    listener: socket.socket | None = None,
) -> dict[str, str]:
    """Return the complete environment of a model's router.

    Args:
        spec: the model and its processes.
        tenants_file: its tenants; None lets everyone use it.
        behind: where it listens behind a gateway; None without one.
        listener: what it listens on without a gateway.
    """
    environment = router.environment(
        spec.deployment,
        spec.endpoint,
        control_url=spec.control_url,
        token=spec.secrets.token,
        tenants_file=tenants_file,
        cors_origins=spec.access.cors_origins,
        listen_fd=None if listener is None else listener.fileno(),
        keep_alive_s=spec.keep_alive_s,
        behind=behind,
        trace_variables=spec.trace_variables,
    )
    return {**environment, **zygote.shared_dir_variables(spec.sandbox_folder)}


def supervised_router(
    environment: Mapping[str, str],
    router_zygote: Zygote,
    log: Callable[[str], None],
    *,
    listener: socket.socket | None = None,
    name: str = "router",
) -> SupervisedContext:
    """Keep a router running.

    Args:
        environment: its complete environment.
        router_zygote: forks it.
        log: called with each line of output.
        listener: what it listens on without a gateway.
        name: its name for messages.
    """
    pass_fds = () if listener is None else (listener.fileno(),)
    return supervised_start(
        name,
        lambda: router_zygote.running_child(
            environment, log=log, grace_s=router.GRACE_S, pass_fds=pass_fds
        ),
        restarts=router.RESTARTS,
    )


def _supervised_gateway(
    spec: StackSpec, logs: LogSinks, listener: socket.socket, behind: router.RouterSocket
) -> SupervisedContext:
    return supervised(
        "gateway",
        gateway.COMMAND,
        environment=gateway.environment(
            spec.deployment,
            spec.endpoint,
            behind,
            page_socket=spec.folder / live_page.SOCKET_NAME if spec.live_page else None,
            listen_fd=listener.fileno(),
            keep_alive_s=spec.keep_alive_s,
            trace_variables=spec.trace_variables,
        ),
        log=logs.sink("gateway"),
        grace_s=gateway.GRACE_S,
        pass_fds=(listener.fileno(),),
    )
