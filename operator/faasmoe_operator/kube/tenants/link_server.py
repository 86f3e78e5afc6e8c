"""Serves gateways over TCP: their configuration, leases of limits, and their reports of requests.

A connection begins with a `GatewayHello`, whose token only gateways have.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from faasmoe_contracts.gateway_hello import MAX_HELLO_BYTES, GatewayHello
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.lease_messages import MAX_LINE_BYTES
from faasmoe_contracts.socket_address import probe_peer
from faasmoe_contracts.tls import GATEWAY_NAME, TlsFolder, is_named
from faasmoe_operator.aio import ChangeNotifier, LineReader
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.lease_server import LeaseServer

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
REPEAT_S = 10.0  # an empty line, by which gateways know that the operator lives


class GatewayLinkServer:
    """Answers gateways.

    Args:
        token: what they show.
        leases: leases tokens of limits.
        links: takes what they report of requests.
        tls: the operator's certificate, with which gateways need one; None listens without TLS.
    """

    def __init__(
        self,
        token: str,
        leases: LeaseServer,
        links: GatewayLinks,
        *,
        tls: TlsFolder | None = None,
    ) -> None:
        self._tls = tls
        self._token = token.encode()
        self._leases = leases
        self._links = links
        self._file = b""
        self._published = ChangeNotifier()
        self._connections: set[asyncio.StreamWriter] = set()

    def publish(self, file: bytes) -> None:
        """Send all gateways a version of their file, without line breaks."""
        self._file = file
        self._published.notify()

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[None]:
        """Listen for the lifetime of the context; raises OSError."""
        secured: dict[str, Any] = {}
        if self._tls is not None:
            secured = {
                "ssl": self._tls.server_context(),
                "ssl_handshake_timeout": HELLO_TIMEOUT_S,
            }
        server = await asyncio.start_server(
            self._serve, host, port, limit=MAX_HELLO_BYTES, **secured
        )
        try:
            yield
        finally:
            server.close()
            for writer in self._connections:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        lines = LineReader(reader, max_bytes=MAX_HELLO_BYTES)
        try:
            if not self._is_gateway(writer):
                logger.warning("gateway link: got no certificate of %s", GATEWAY_NAME)
                return
            probe_peer(writer)
            hello = await self._read_hello(lines)
            if hello is None:
                return
            lines.max_bytes = MAX_LINE_BYTES
            logger.info("gateway %s: connected for %s", hello.gateway, hello.purpose)
            if hello.purpose == "config":
                await self._send_files(reader, writer)
            elif hello.purpose == "leases":
                await self._leases.serve(lines, writer)
            else:
                await self._links.serve(lines, writer)
        finally:
            self._connections.discard(writer)
            writer.close()

    def _is_gateway(self, writer: asyncio.StreamWriter) -> bool:
        """Return whether a client has shown a gateway's certificate, if there is TLS."""
        return self._tls is None or is_named(writer.get_extra_info("ssl_object"), {GATEWAY_NAME})

    async def _read_hello(self, lines: LineReader) -> GatewayHello | None:
        """Return who connects; None for nobody who may."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = GatewayHello.loads(await lines.readline())
        except (ContractError, ValueError, OSError) as error:
            # Of a message that is no hello nothing is shown, as it may contain a token.
            logger.warning("gateway link: got no hello (%s)", type(error).__name__)
            return None
        if not hmac.compare_digest(hello.token.encode(), self._token):
            logger.warning("gateway link: got a wrong token")
            return None
        return hello

    async def _send_files(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send each version of the file until the gateway disconnects."""
        sending = asyncio.create_task(self._send_each_file(writer))
        try:
            while await reader.read(MAX_HELLO_BYTES):
                pass  # it has nothing to say
        except OSError:
            return
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send_each_file(self, writer: asyncio.StreamWriter) -> None:
        sent = b""
        while True:
            file = self._file
            writer.write(b"\n" if file == sent else file + b"\n")
            await writer.drain()
            sent = file
            try:
                async with asyncio.timeout(REPEAT_S):
                    await self._published.wait_for(lambda: self._file != sent)  # noqa: B023
            except TimeoutError:
                continue
