"""`python -m faasmoe_gateway`: the public front, configured by FAASMOE_* variables.

It is of one router, which has the tenants (FAASMOE_ROUTER_SOCKET), or of several models and their
tenants (FAASMOE_GATEWAY_FILE). On Kubernetes the operator (FAASMOE_CONTROL_ADDRESS) replaces that
file as they change.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import sys
import time

from prometheus_client import start_http_server
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from faasmoe_contracts.gateway_file import GatewayFile
from faasmoe_contracts.gateway_hello import PURPOSES, GatewayHello
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.tenant_usage import usage_file
from faasmoe_contracts.tls import OPERATOR_NAME, TlsError, TlsFolder, TlsPeer
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.config import GatewayConfig, GatewayConfigError
from faasmoe_gateway.connections import ConnectionLimits, descriptor_limited
from faasmoe_gateway.control_link import ControlLink
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.front import Front
from faasmoe_gateway.held_request import HoldBudget
from faasmoe_gateway.lease_client import LeaseClient
from faasmoe_gateway.metrics import GatewayMetrics, GatewayState
from faasmoe_gateway.relay import PROBE_HOLD_S, RouterAddress
from faasmoe_gateway.server import Server, inherited_listeners
from faasmoe_gateway.tenant_directory import TenantDirectory
from faasmoe_tracing import Tracer, create_tracer

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
    tracer = create_tracer(os.environ, service="faasmoe-gateway")
    try:
        app = _make_app(config, tracer)
    except ContractError as error:
        print(f"faasmoe_gateway: FAASMOE_GATEWAY_FILE: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except TlsError as error:
        print(f"faasmoe_gateway: FAASMOE_TLS_FOLDER: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except OSError as error:
        print(f"faasmoe_gateway: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    descriptors = descriptor_limited(CONNECTIONS_PER_CLIENT * config.max_connections)
    server = Server(
        _with_cors(app, config),
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
    tracer.close()
    return 0 if server.started else EXIT_FAILED


def _make_app(config: GatewayConfig, tracer: Tracer) -> GatewayApp | Front:
    """Return the app of one router or of several models.

    Raises:
        ContractError: the gateway's file is invalid.
        TlsError: the TLS folder is not usable.
        OSError: a file cannot be read.
    """
    page = None
    if config.page_socket is not None:
        page = RouterAddress(str(config.page_socket.absolute()), "", PROBE_HOLD_S)
    if config.gateway_file is None:
        assert config.router_socket is not None
        router = RouterAddress(
            str(config.router_socket.absolute()), config.front_token, config.hold_timeout_s
        )
        return GatewayApp(router, page=page, tracer=tracer)
    file = GatewayFile.loads(config.gateway_file.read_bytes())
    tls = None if config.tls_folder is None else TlsFolder(config.tls_folder)
    links = _control_links(config, tls)
    usage = None if config.state_dir is None else usage_file(config.state_dir, config.index)
    share = 0.0 if "leases" in links else 1.0
    accounts = Accounts(file.tenants, usage, time.monotonic(), share=share)
    leases = None
    if "leases" in links:
        name = config.name or str(config.index)
        leases = LeaseClient(
            links["leases"],
            name,
            accounts,
            # Usage that is in no file ends with the process.
            run=name if usage is not None else f"{name}/{secrets.token_hex(8)}",
            clock=time.monotonic,
            wall_clock=time.time,
        )
    metrics, budget = GatewayMetrics(), HoldBudget()
    front = Front(
        TenantDirectory(file, time.time()),
        accounts,
        front_token=config.front_token,
        hold_timeout_s=config.hold_timeout_s,
        demand=DemandReporter(links.get("demand")),
        tracer=tracer,
        leases=leases,
        config_link=links.get("config"),
        page=page,
        budget=budget,
        metrics=metrics,
        tls=tls,
    )
    metrics.registry.register(
        GatewayState(
            waiting=front.waiting,
            held_bytes=lambda: budget.n_bytes,
            connected=lambda: [(purpose, link.is_connected) for purpose, link in links.items()],
            lease_age_s=lambda: None if leases is None else time.monotonic() - leases.renewed_s,
        )
    )
    if config.gateway_metrics_port is not None:
        port = config.gateway_metrics_port + config.index
        start_http_server(port, config.gateway_metrics_host, metrics.registry)
    return front


def _control_links(config: GatewayConfig, tls: TlsFolder | None) -> dict[str, ControlLink]:
    """Return the connections to the control plane by their purpose; raises OSError."""
    if config.control_address is not None:
        assert config.control_token_file is not None
        token = config.control_token_file.read_text().strip()
        operator = None if tls is None else TlsPeer(tls, OPERATOR_NAME)
        return {
            purpose: ControlLink(
                config.control_address, GatewayHello(token, config.name, purpose), tls=operator
            )
            for purpose in PURPOSES
        }
    sockets = {"demand": config.demand_socket, "leases": config.lease_socket}
    return {
        purpose: ControlLink.to_socket(path)
        for purpose, path in sockets.items()
        if path is not None
    }


def _with_cors(app: ASGIApp, config: GatewayConfig) -> ASGIApp:
    if not config.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(config.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["*"],
    )


if __name__ == "__main__":
    sys.exit(main())
