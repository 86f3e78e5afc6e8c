"""Runs a sandbox: listens on TCP and a Unix socket, serves until a signal, then drains.

One thread runs the event loop and computes frames. Importing this module computes nothing, so a
zygote may import it and fork. While draining, the sandbox keeps connections open so that clients
learn of the shutdown from a response instead of a reset connection.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvloop

from faasmoe_contracts.tls import OPERATOR_NAME, TlsFolder, models_name
from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_expert.config import SandboxConfig, open_tls_folder
from faasmoe_expert.device import resolve_device
from faasmoe_expert.errors import SandboxDeviceLost
from faasmoe_expert.functions.native_kernel import describe_kernels
from faasmoe_expert.server.api import HeapTrimmer, SandboxRoutes
from faasmoe_expert.server.connection import HttpConnection
from faasmoe_expert.server.http import ReadLimits
from faasmoe_expert.server.loader import BackgroundLoader
from faasmoe_expert.server.runtime import SandboxRuntime

logger = logging.getLogger(__name__)

MAX_SCRAPERS = 16
SHUTDOWN_TIMEOUT_S = 2.0
"""Time for clients to read pending responses after the drain."""

SWITCH_INTERVAL_S = 0.0002
"""Thread switch interval: the loader acquires the GIL some hundred times per attachment, and would
wait 5 ms (Python's default) each time while frames are computed (docs/performance-log.md)."""

ConnectionFactory = Callable[[], asyncio.BaseProtocol]


def serve(config: SandboxConfig, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain for at most config.drain_s + SHUTDOWN_TIMEOUT_S.

    Args:
        config: settings of the sandbox.
        listener: bound socket to listen on instead of config.host and config.port.

    Raises:
        SandboxConfigError: the device does not exist or is unusable, or the TLS folder is.
        SandboxDeviceLost: the device became unusable.
        OSError: the address cannot be listened on.
    """
    torch.set_num_threads(config.threads)
    torch.set_grad_enabled(False)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    tls = open_tls_folder(config.tls_folder)
    runtime = SandboxRuntime(config, resolve_device(config.device), tls=tls)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_stopped(runtime, listener, tls))
    finally:
        runtime.close()


async def _serve_until_stopped(
    runtime: SandboxRuntime, listener: socket.socket | None, tls: TlsFolder | None
) -> None:
    config, stop, connections = runtime.config, asyncio.Event(), set[HttpConnection]()
    scrapers = set[HttpConnection]()
    lost_reasons: list[str] = []

    def stop_on_device_lost(reason: str) -> None:
        lost_reasons.append(reason)
        stop.set()

    routes = SandboxRoutes(runtime, BackgroundLoader(runtime), on_device_lost=stop_on_device_lost)
    new_connection = functools.partial(
        HttpConnection,
        HeapTrimmer(routes.handle).handle,
        connections,
        timeout_s=config.request_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        max_connections=config.max_connections,
        read_limits=ReadLimits(max_frames=config.max_frames, max_bytes=config.max_bodies_bytes),
        is_authorized=routes.is_authorized,
        peers={OPERATOR_NAME, models_name(config.tls_namespace)},
    )
    listeners = await Listeners.open(new_connection, config, listener, tls)
    if config.metrics_port is not None:
        new_scraper = functools.partial(
            HttpConnection,
            routes.handle_metrics,
            scrapers,
            timeout_s=config.request_timeout_s,
            max_connections=MAX_SCRAPERS,
        )
        await listeners.listen_for_scrapers(new_scraper, config.metrics_port)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    address = f"{listeners.host}:{listeners.port}"
    logger.info(
        "sandbox %s listening on %s, device %s, kernels: %s",
        config.id,
        address,
        runtime.device,
        describe_kernels(runtime.device),
    )
    await stop.wait()
    routes.start_draining()
    for connection in tuple(connections):  # no frame will come through a mailbox any more
        connection.close_held()
    logger.info("sandbox %s draining for up to %g s", config.id, config.drain_s)
    await _wait_until_drained(connections, drain_s=config.drain_s)
    listeners.close()
    await _close_connections(connections | scrapers)
    if lost_reasons:
        raise SandboxDeviceLost(
            f"device: {runtime.device} is lost ({lost_reasons[0]})", field="device"
        )


async def _wait_until_drained(connections: set[HttpConnection], *, drain_s: float) -> None:
    """Wait for `drain_s`, or until all clients have disconnected."""
    deadline_s = time.monotonic() + drain_s
    while connections and (remaining_s := deadline_s - time.monotonic()) > 0:
        await asyncio.wait([c.closed for c in connections], timeout=remaining_s)


async def _close_connections(connections: set[HttpConnection]) -> None:
    for connection in tuple(connections):
        connection.close()
    if connections:
        await asyncio.wait([c.closed for c in connections], timeout=SHUTDOWN_TIMEOUT_S)
    for connection in tuple(connections):
        connection.abort()


class Listeners:
    """The listening sockets of a sandbox.

    Attributes:
        host: address of the TCP socket.
        port: actual port of the TCP socket.
    """

    def __init__(self, tcp: asyncio.Server) -> None:
        self.host, self.port = tcp.sockets[0].getsockname()[:2]
        self._tcp = tcp
        self._metrics: asyncio.Server | None = None
        self._unix: asyncio.Server | None = None
        self._unix_path: Path | None = None

    @classmethod
    async def open(
        cls,
        new_connection: ConnectionFactory,
        config: SandboxConfig,
        listener: socket.socket | None,
        tls: TlsFolder | None = None,
    ) -> Listeners:
        """Listen on TCP, and on a Unix socket if configured.

        Args:
            new_connection: creates the protocol of a connection.
            config: host, port and socket_dir.
            listener: bound TCP socket; None binds the configured host and port.
            tls: certificate of the TCP socket; None listens without TLS.

        Raises:
            OSError: the TCP address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        endpoint: dict[str, Any] = {"host": config.host, "port": config.port}
        if listener is not None:
            endpoint = {"sock": listener}
        if tls is not None:
            endpoint["ssl"] = tls.server_context()
            endpoint["ssl_handshake_timeout"] = config.request_timeout_s
        listeners = cls(await loop.create_server(new_connection, **endpoint))
        if config.socket_dir is not None:
            await listeners._listen_unix(new_connection, config.socket_dir)
        return listeners

    async def listen_for_scrapers(self, new_connection: ConnectionFactory, port: int) -> None:
        """Listen on the port of the metrics, at the same address; raises OSError."""
        loop = asyncio.get_running_loop()
        self._metrics = await loop.create_server(new_connection, self.host, port)

    async def _listen_unix(self, new_connection: ConnectionFactory, socket_dir: Path) -> None:
        path = unix_socket_path(socket_dir, self.port)
        try:
            os.makedirs(socket_dir, mode=0o700, exist_ok=True)
            self._unix = await asyncio.get_running_loop().create_unix_server(
                new_connection, str(path)
            )
        except OSError as error:  # routers fall back to TCP
            logger.warning("FAASMOE_SOCKET_DIR: %s: cannot listen: %s", path, error)
            return
        self._unix_path = path

    def close(self) -> None:
        """Stop accepting connections; open connections are unaffected."""
        self._tcp.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._unix is not None:
            self._unix.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
