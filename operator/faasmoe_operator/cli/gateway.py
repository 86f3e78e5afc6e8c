"""The gateway as a child process: the front that listens for clients while the router may not."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from faasmoe_operator.cli.router import DEFAULT_ENVIRONMENT, Endpoint, RouterSocket
from faasmoe_operator.control.local_model import LocalModel

COMMAND = (sys.executable, "-m", "faasmoe_gateway")
GRACE_S = 30.0  # it drains running responses for up to 20 s


def environment(
    deployment: LocalModel,
    endpoint: Endpoint,
    router: RouterSocket,
    *,
    listen_fd: int,
    page_socket: Path | None = None,
    keep_alive_s: float | None = None,
    trace_variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of the gateway of one router.

    Args:
        deployment: the model to serve.
        endpoint: address to listen on.
        router: the router behind it.
        page_socket: Unix socket of the live page; None for none.
        listen_fd: descriptor of a socket that listens on `endpoint`.
        keep_alive_s: how long unused connections are kept; None for the spec's, or the default.
        trace_variables: variables by which it traces.
    """
    if keep_alive_s is None:
        keep_alive_s = deployment.model.spec.router.keep_alive_seconds
    return _variables(
        {
            "HOST": endpoint.host,
            "PORT": endpoint.port,
            "LISTEN_FD": listen_fd,
            "ROUTER_SOCKET": router.path,
            "PAGE_SOCKET": page_socket,
            "FRONT_TOKEN": router.front_token,
            "KEEP_ALIVE": keep_alive_s,
        },
        trace_variables,
    )


def shared_environment(
    file: Path,
    endpoint: Endpoint,
    *,
    front_token: str,
    state_path: Path,
    listen_fd: int,
    demand_socket: Path,
    cors_origins: Sequence[str],
    keep_alive_s: float | None,
    page_socket: Path | None,
    lease_socket: Path | None,
    index: int,
    trace_variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of a gateway of several models.

    Args:
        file: models and tenants.
        endpoint: address to listen on.
        front_token: what it shows the routers.
        state_path: folder of the tenants' usage.
        listen_fd: descriptor of a socket that listens on `endpoint`.
        demand_socket: where it reports requests.
        cors_origins: origins of web pages that may call the API.
        keep_alive_s: how long unused connections are kept; None for the default.
        page_socket: Unix socket of the live page; None for none.
        lease_socket: where it leases tokens of limits; None if it is the only gateway.
        index: its number, from 0.
        trace_variables: variables by which it traces.
    """
    return _variables(
        {
            "HOST": endpoint.host,
            "PORT": endpoint.port,
            "LISTEN_FD": listen_fd,
            "INDEX": index,
            "LEASE_SOCKET": lease_socket,
            "GATEWAY_FILE": file,
            "STATE_DIR": state_path,
            "FRONT_TOKEN": front_token,
            "DEMAND_SOCKET": demand_socket,
            "PAGE_SOCKET": page_socket,
            "CORS_ORIGINS": ",".join(cors_origins) or None,
            "KEEP_ALIVE": keep_alive_s,
        },
        trace_variables,
    )


def _variables(
    settings: Mapping[str, object], trace_variables: Mapping[str, str] | None
) -> dict[str, str]:
    return {
        **DEFAULT_ENVIRONMENT,
        **os.environ,
        **(trace_variables or {}),
        **{f"FAASMOE_{name}": str(value) for name, value in settings.items() if value is not None},
    }
