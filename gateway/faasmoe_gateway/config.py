"""Settings of the gateway process, read from its environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from faasmoe_contracts.environment import integer_between, seconds_between
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.socket_address import split_host_port
from faasmoe_gateway.connections import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS

PREFIX = "FAASMOE_"
MAX_GATEWAYS = 64


class GatewayConfigError(Exception):
    """A setting is missing or invalid; the message names the variable."""


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of a gateway; each field is the variable FAASMOE_FIELD, without a trailing `_S`.

    Attributes:
        router_socket: Unix socket of the only router; None with a gateway file.
        front_token: what it shows routers.
        gateway_file: models and tenants; None with one router, which has the tenants.
        state_dir: folder of the tenants' usage; None keeps it in memory.
        demand_socket: where requests are reported, to start routers; None if they always run.
        lease_socket: where tokens of limits are leased, which all gateways share; None if this is
            the only gateway.
        control_address: HOST:PORT of the operator, which sends the gateway file whenever it
            changes, leases tokens and starts routers; None on one machine.
        control_token_file: file of the token that it shows the operator.
        name: name of this gateway for the operator, the same after a restart: that of its pod.
        index: number of this gateway, from 0.
        gateway_metrics_port: port of its metrics, plus `index`; None for none.
        gateway_metrics_host: address that they are on; by default `host` if there is an operator,
            as nobody else may reach that port of the pod, else loopback.
        cors_origins: origins of web pages that may call the API, with a gateway file.
        page_socket: Unix socket of the live page; None for none.
        host: address to listen on.
        port: port to listen on.
        listen_fd: descriptor of an inherited socket that listens there; None opens one.
        keep_alive_s: how long an unused connection of a client is kept.
        max_connections: connections of clients, fewer if the process may not open as many files.
        max_connections_per_address: connections of one client address.
        drain_timeout_s: time that running responses have at shutdown.
        hold_timeout_s: how long requests wait for a router that is away.
        tls_folder: certificate, key and authorities for TLS with the operator and with routers that
            have certificates; None for neither. The gateway's own port has no TLS.
    """

    router_socket: Path | None
    front_token: str
    gateway_file: Path | None = None
    state_dir: Path | None = None
    demand_socket: Path | None = None
    lease_socket: Path | None = None
    control_address: str | None = None
    control_token_file: Path | None = None
    name: str = ""
    index: int = 0
    gateway_metrics_port: int | None = None
    gateway_metrics_host: str = "127.0.0.1"
    cors_origins: tuple[str, ...] = ()
    page_socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    listen_fd: int | None = None
    keep_alive_s: float = 75.0
    max_connections: int = MAX_CONNECTIONS
    max_connections_per_address: int = MAX_CONNECTIONS_PER_ADDRESS
    drain_timeout_s: float = 20.0
    hold_timeout_s: float = 60.0
    tls_folder: Path | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Read the settings; an empty variable counts as not set. Raises GatewayConfigError."""
        gateway_file = _read(env, "GATEWAY_FILE", Path, None)
        router_socket = None
        if gateway_file is None:
            router_socket = Path(_required(env, "ROUTER_SOCKET", "a path"))
            if port := env.get(f"{PREFIX}GATEWAY_METRICS_PORT"):
                expected = "none with one router, whose metrics tell the same"
                raise GatewayConfigError(
                    f"{PREFIX}GATEWAY_METRICS_PORT: got {port}, expected {expected}"
                )
            if folder := env.get(f"{PREFIX}TLS_FOLDER"):
                expected = "none with one router, whose Unix socket has no TLS"
                raise GatewayConfigError(f"{PREFIX}TLS_FOLDER: got {folder}, expected {expected}")
        control_address = _read(env, "CONTROL_ADDRESS", _host_and_port, None)
        token_file, name = None, ""
        host = env.get(f"{PREFIX}HOST") or cls.host
        if control_address is not None:
            if gateway_file is None:
                _required(env, "GATEWAY_FILE", "a path, as there is FAASMOE_CONTROL_ADDRESS")
            token_file = Path(_required(env, "CONTROL_TOKEN_FILE", "a path"))
            name = _required(env, "NAME", "the name of the pod")
        return cls(
            router_socket=router_socket,
            # The operator's file has a token for each model.
            front_token=""
            if control_address is not None
            else _required(env, "FRONT_TOKEN", "a secret"),
            gateway_file=gateway_file,
            state_dir=_read(env, "STATE_DIR", Path, None),
            demand_socket=_read(env, "DEMAND_SOCKET", Path, None),
            lease_socket=_read(env, "LEASE_SOCKET", Path, None),
            control_address=control_address,
            control_token_file=token_file,
            name=name,
            gateway_metrics_port=_read(
                env, "GATEWAY_METRICS_PORT", integer_between(1, 65535 - MAX_GATEWAYS), None
            ),
            gateway_metrics_host=env.get(f"{PREFIX}GATEWAY_METRICS_HOST")
            or (cls.gateway_metrics_host if control_address is None else host),
            index=_read(env, "INDEX", integer_between(0, MAX_GATEWAYS - 1), 0),
            cors_origins=_read(env, "CORS_ORIGINS", _origins, ()),
            page_socket=_read(env, "PAGE_SOCKET", Path, None),
            host=host,
            port=_read(env, "PORT", integer_between(0, 65535), cls.port),
            listen_fd=_read(env, "LISTEN_FD", integer_between(0, 1 << 20), None),
            keep_alive_s=_read(env, "KEEP_ALIVE", seconds_between(1, 3600), cls.keep_alive_s),
            max_connections=_read(
                env, "MAX_CONNECTIONS", integer_between(1, 1 << 20), cls.max_connections
            ),
            max_connections_per_address=_read(
                env,
                "MAX_CONNECTIONS_PER_ADDRESS",
                integer_between(1, 1 << 20),
                cls.max_connections_per_address,
            ),
            drain_timeout_s=_read(
                env, "DRAIN_TIMEOUT", seconds_between(0, 3600), cls.drain_timeout_s
            ),
            hold_timeout_s=_read(env, "HOLD_TIMEOUT", seconds_between(0, 3600), cls.hold_timeout_s),
            tls_folder=_read(env, "TLS_FOLDER", Path, None),
        )


def _host_and_port(text: str) -> str:
    try:
        found = split_host_port(text)
    except ContractError:
        found = None
    if found is None:
        raise ValueError("HOST:PORT")
    return text


def _origins(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _required(env: Mapping[str, str], name: str, expected: str) -> str:
    value = env.get(PREFIX + name, "")
    if not value:
        raise GatewayConfigError(f"{PREFIX}{name}: not set, expected {expected}")
    return value


def _read(env: Mapping[str, str], name: str, parse: Callable[[Any], Any], default: Any) -> Any:
    value = env.get(PREFIX + name, "")
    if not value:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise GatewayConfigError(f"{PREFIX}{name}: got {value!r}, expected {error}") from None
