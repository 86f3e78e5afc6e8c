"""The sockets that a sandbox listens on: TCP, and a Unix socket for routers of the same machine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.same_node import socket_path

logger = logging.getLogger(__name__)

NewConnection = Callable[[], asyncio.BaseProtocol]


class Listeners:
    """What listens, until it is closed.

    Attributes:
        host: address of the TCP socket.
        port: its port, as the system chose it.
    """

    def __init__(self, tcp: asyncio.Server) -> None:
        self.host, self.port = tcp.sockets[0].getsockname()[:2]
        self._tcp = tcp
        self._near: asyncio.Server | None = None
        self._path: Path | None = None

    @classmethod
    async def open(
        cls, new_connection: NewConnection, config: SandboxConfig, bound: socket.socket | None
    ) -> Listeners:
        """Listen on a bound socket, else on the configured host and port; raises OSError."""
        loop = asyncio.get_running_loop()
        place = {"sock": bound} if bound else {"host": config.host, "port": config.port}
        listeners = cls(await loop.create_server(new_connection, **place))
        if config.socket_dir is not None:
            await listeners._listen_near(new_connection, config.socket_dir)
        return listeners

    async def _listen_near(self, new_connection: NewConnection, folder: Path) -> None:
        path = socket_path(folder, self.port)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._near = await asyncio.get_running_loop().create_unix_server(
                new_connection, str(path)
            )
        except OSError as error:  # routers take TCP
            logger.warning("FAASMOE_SOCKET_DIR: %s: cannot listen: %s", path, error)
            return
        self._path = path

    def close(self) -> None:
        """Accept no more; connections that are open stay open."""
        self._tcp.close()
        if self._near is not None:
            self._near.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
