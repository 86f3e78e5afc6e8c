"""The HTTP server of a router process, with either engine, by the router's settings."""

from __future__ import annotations

import socket
from collections.abc import Callable

from starlette.types import ASGIApp

from faasmoe_gateway.connections import ConnectionLimits, descriptor_limited
from faasmoe_gateway.server import Server, inherited_listeners
from faasmoe_router.config import RouterConfig, open_tls_folder
from faasmoe_router.errors import RouterConfigError


def create_http_server(
    app: ASGIApp,
    config: RouterConfig,
    *,
    on_started: Callable[[], None],
    on_drain_timeout: Callable[[], None],
) -> tuple[Server, list[socket.socket] | None]:
    """Return the server, and the sockets to run it on; None for those that it opens itself.

    Args:
        app: the API.
        config: the router's settings.
        on_started: called once it listens.
        on_drain_timeout: called when requests have not ended within the drain time.

    Raises:
        RouterConfigError: an inherited socket is none, or the TLS folder is not usable.
    """
    server = Server(
        app,
        host=config.host,
        port=config.port,
        path=config.listen_path,
        on_started=on_started,
        on_drain_timeout=on_drain_timeout,
        drain_timeout_s=config.drain_timeout_s,
        connection_limits=ConnectionLimits(
            max_connections=descriptor_limited(config.max_connections),
            max_per_address=config.max_connections_per_address,
            keep_alive_s=config.keep_alive_s,
        ),
        tls=open_tls_folder(config) if config.listen_path is None else None,
    )
    try:
        return server, inherited_listeners(config.listen_fd)
    except ValueError as error:
        raise RouterConfigError(str(error)) from error
