"""The sockets that a sandbox listens on: TCP, and a Unix socket for routers of the same machine.

The sandbox server: HTTP in front of attached functions, in one thread.

`serve` blocks until SIGTERM or SIGINT, and then as long as its clients need to hear of the end.
Nothing is computed before it is called, so that a zygote may import this module and fork.
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

import torch
import uvloop

from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.device import resolve_device
from faasmoe_expert.errors import SandboxDeviceLost
from faasmoe_expert.server.api import HeapTrimmer, SandboxRoutes
from faasmoe_expert.server.connection import HttpConnection
from faasmoe_expert.server.http import ReadLimits
from faasmoe_expert.server.runtime import BackgroundLoader, SandboxRuntime

logger = logging.getLogger(__name__)


ConnectionFactory = Callable[[], asyncio.BaseProtocol]


class Listeners:
    """What listens, until it is closed.

    Attributes:
        host: address of the TCP socket.
        port: its port, as the system chose it.
    """

    def __init__(self, tcp: asyncio.Server) -> None:
        self.host, self.port = tcp.sockets[0].getsockname()[:2]
        self._tcp = tcp
        self._unix: asyncio.Server | None = None
        self._unix_path: Path | None = None

    @classmethod
    async def open(
        cls,
        new_connection: ConnectionFactory,
        config: SandboxConfig,
        listener: socket.socket | None,
    ) -> Listeners:
        """Listen on a bound socket, else on the configured host and port; raises OSError."""
        loop = asyncio.get_running_loop()
        endpoint = {"sock": listener} if listener else {"host": config.host, "port": config.port}
        listeners = cls(await loop.create_server(new_connection, **endpoint))
        if config.socket_dir is not None:
            await listeners._listen_unix(new_connection, config.socket_dir)
        return listeners

    async def _listen_unix(self, new_connection: ConnectionFactory, socket_dir: Path) -> None:
        path = unix_socket_path(socket_dir, self.port)
        try:
            os.makedirs(socket_dir, mode=0o700, exist_ok=True)
            self._unix = await asyncio.get_running_loop().create_unix_server(
                new_connection, str(path)
            )
        except OSError as error:  # routers take TCP
            logger.warning("FAASMOE_SOCKET_DIR: %s: cannot listen: %s", path, error)
            return
        self._unix_path = path

    def close(self) -> None:
        """Accept no more; connections that are open stay open."""
        self._tcp.close()
        if self._unix is not None:
            self._unix.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)


SHUTDOWN_TIMEOUT_S = 2.0  # for clients to take the answers that are on their way, after the drain

SWITCH_INTERVAL_S = 0.0002
"""How long a thread waits for Python's lock before it asks for it: attaching takes it some hundred
times, and would wait 5 ms for each while frames are computed (docs/performance.md)."""


__all__ = ["serve"]


def serve(config: SandboxConfig, listener: socket.socket | None = None) -> None:
    """Serve a sandbox until SIGTERM or SIGINT, then for at most config.drain_s + SHUTDOWN_S.

    Args:
        config: the sandbox's settings.
        listener: a bound socket to listen on instead of config.host and config.port.

    Raises:
        DeviceLost: the device could not be used any more, so that the sandbox has ended.
    """
    torch.set_num_threads(config.threads)
    torch.set_grad_enabled(False)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    runtime = SandboxRuntime(config, resolve_device(config.device))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_until_stopped(runtime, listener))


async def _serve_until_stopped(runtime: SandboxRuntime, listener: socket.socket | None) -> None:
    config, stop, connections = runtime.config, asyncio.Event(), set[HttpConnection]()
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
    )
    listeners = await Listeners.open(new_connection, config, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    address = f"{listeners.host}:{listeners.port}"
    logger.info("sandbox %s listens on %s, device %s", config.id, address, runtime.device)
    await stop.wait()
    routes.start_draining()
    logger.info("sandbox %s draining for up to %g s", config.id, config.drain_s)
    await _wait_until_drained(connections, drain_s=config.drain_s)
    listeners.close()
    await _close_connections(connections)
    if lost_reasons:
        raise SandboxDeviceLost(
            f"device: {runtime.device} is lost ({lost_reasons[0]})", field="device"
        )


async def _wait_until_drained(connections: set[HttpConnection], *, drain_s: float) -> None:
    """Wait for the drain time, or until no client is left who could hear of the end."""
    deadline_s = time.monotonic() + drain_s
    while connections and (left_s := deadline_s - time.monotonic()) > 0:
        await asyncio.wait([c.closed for c in connections], timeout=left_s)


async def _close_connections(connections: set[HttpConnection]) -> None:
    for connection in tuple(connections):
        connection.close()
    if connections:
        await asyncio.wait([c.closed for c in connections], timeout=SHUTDOWN_TIMEOUT_S)
    for connection in tuple(connections):
        connection.abort()
