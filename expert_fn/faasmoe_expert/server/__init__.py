"""The sandbox server: HTTP in front of attached functions, in one thread.

`serve` blocks until SIGTERM or SIGINT, and then as long as its clients need to hear of the end.
Nothing is computed before it is called, so that a zygote may import this module and fork.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
import sys
import time

import torch
import uvloop

from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.device import resolve_device
from faasmoe_expert.errors import DeviceLost
from faasmoe_expert.server.attaching import Attaching
from faasmoe_expert.server.intake import Intake
from faasmoe_expert.server.listeners import Listeners
from faasmoe_expert.server.protocol import HttpProtocol
from faasmoe_expert.server.routes import Routes
from faasmoe_expert.server.sandbox import Sandbox
from faasmoe_expert.server.tidy import Tidy

SHUTDOWN_S = 2.0  # for clients to take the answers that are on their way, after the drain

SWITCH_INTERVAL_S = 0.0002
"""How long a thread waits for Python's lock before it asks for it: attaching takes it some hundred
times, and would wait 5 ms for each while frames are computed (docs/performance.md)."""

log = logging.getLogger(__name__)

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
    sandbox = Sandbox(config, resolve_device(config.device))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sandbox, listener))


async def _serve(sandbox: Sandbox, listener: socket.socket | None) -> None:
    config, stop, connections = sandbox.config, asyncio.Event(), set[HttpProtocol]()
    lost: list[str] = []

    def end_by(why: str) -> None:
        lost.append(why)
        stop.set()

    routes = Routes(sandbox, Attaching(sandbox), on_lost=end_by)
    new_connection = functools.partial(
        HttpProtocol,
        Tidy(routes.handle).handle,
        connections,
        timeout_s=config.request_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        max_connections=config.max_connections,
        intake=Intake(max_frames=config.max_frames, max_bytes=config.max_bodies_bytes),
    )
    listeners = await Listeners.open(new_connection, config, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    place = f"{listeners.host}:{listeners.port}"
    log.info("sandbox %s listens on %s, device %s", config.id, place, sandbox.device)
    await stop.wait()
    routes.drain()
    log.info("sandbox %s drains for at most %g s", config.id, config.drain_s)
    await _drained(connections, drain_s=config.drain_s)
    listeners.close()
    await _end(connections)
    if lost:
        raise DeviceLost(f"device: {sandbox.device} is lost ({lost[0]})", field="device")


async def _drained(connections: set[HttpProtocol], *, drain_s: float) -> None:
    """Wait for the drain time, or until no client is left who could hear of the end."""
    end_s = time.monotonic() + drain_s
    while connections and (left_s := end_s - time.monotonic()) > 0:
        await asyncio.wait([c.closed for c in connections], timeout=left_s)


async def _end(connections: set[HttpProtocol]) -> None:
    for connection in tuple(connections):
        connection.close()
    if connections:
        await asyncio.wait([c.closed for c in connections], timeout=SHUTDOWN_S)
    for connection in tuple(connections):
        connection.abort()
