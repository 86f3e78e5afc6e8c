"""Follows the gateway's file, which the operator sends whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Never

from faasmoe_contracts.gateway_file import GatewayFile
from faasmoe_contracts.json_reader import ContractError
from faasmoe_gateway.control_link import ControlLink

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 << 20
RECONNECT_S = 0.5
SILENCE_S = 30.0  # the operator repeats an unchanged file as an empty line, more often than that


class ConfigFollower:
    """Takes each version of the file; without the operator the last one stays in force.

    Args:
        link: where it comes from.
        on_file: called with each version.
    """

    def __init__(self, link: ControlLink, on_file: Callable[[GatewayFile], None]) -> None:
        self._link = link
        self._on_file = on_file

    async def run(self) -> Never:
        """Follow until cancelled, and connect again if the operator ends."""
        while True:
            try:
                await self._follow()
            except (OSError, TimeoutError, ContractError, ValueError) as error:
                logger.warning("No configuration from %s: %r", self._link, error)
            finally:
                self._link.is_connected = False
            await asyncio.sleep(RECONNECT_S)

    async def _follow(self) -> None:
        reader, writer = await self._link.open(limit=MAX_FILE_BYTES)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    line = await reader.readline()
                if not line:
                    raise ConnectionError("the operator has ended the connection")
                if line.strip():
                    self._on_file(GatewayFile.loads(line))
                self._link.is_connected = True
        finally:
            writer.close()
