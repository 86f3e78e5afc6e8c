"""`python -m faasmoe_gateway`: the front of one router, configured by FAASMOE_* variables."""

from __future__ import annotations

import gc
import logging
import sys

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.config import GatewayConfig, GatewayConfigError
from faasmoe_gateway.connections import ConnectionLimits, descriptor_limited
from faasmoe_gateway.relay import PROBE_HOLD_S, RouterAddress
from faasmoe_gateway.server import Server, inherited_listeners

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
CONNECTIONS_PER_CLIENT = 2  # descriptors: a client's, and one to the router


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        die_with_parent()
        config = GatewayConfig.from_env()
        listeners = inherited_listeners(config.listen_fd)
    except (GatewayConfigError, ParentDeathError, ValueError) as error:
        print(f"faasmoe_gateway: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    page = None
    if config.page_socket is not None:
        page = RouterAddress(config.page_socket, "", PROBE_HOLD_S)
    router = RouterAddress(config.router_socket, config.front_token, config.hold_timeout_s)
    app = GatewayApp(router, page=page)
    descriptors = descriptor_limited(CONNECTIONS_PER_CLIENT * config.max_connections)
    server = Server(
        app,
        host=config.host,
        port=config.port,
        on_drain_timeout=app.abort_running,
        drain_timeout_s=config.drain_timeout_s,
        connection_limits=ConnectionLimits(
            max_connections=max(1, descriptors // CONNECTIONS_PER_CLIENT),
            max_per_address=config.max_connections_per_address,
            keep_alive_s=config.keep_alive_s,
        ),
    )
    gc.freeze()
    server.run(sockets=listeners)
    return 0 if server.started else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
