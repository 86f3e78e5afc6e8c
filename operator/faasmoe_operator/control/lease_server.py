"""Serves leases of the tenants' limits to gateways: of a machine, or of a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_contracts.gateway_file import GatewayFile, TenantEntry
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.lease_messages import (
    MAX_LINE_BYTES,
    LeaseAnswer,
    LeaseReport,
    PeriodUsage,
)
from faasmoe_operator.aio import LineSource
from faasmoe_operator.control.lease_book import LeaseBook, Shares, parse_shares
from faasmoe_operator.control.models_file import ModelsFileError

SHARES_FILE_NAME = "lease-shares.json"

logger = logging.getLogger(__name__)


class LeaseServer:
    """Answers gateways.

    Args:
        book: the leases.
        save: keeps shares for a restart of this process; raises OSError if it cannot.
    """

    def __init__(self, book: LeaseBook, save: Callable[[Shares], Awaitable[None]]) -> None:
        self._book = book
        self._save = save
        self._saving = asyncio.Lock()

    async def serve(self, reader: LineSource, writer: asyncio.StreamWriter) -> None:
        """Answer one gateway until it disconnects."""
        told: dict[str, PeriodUsage] = {}
        try:
            while line := await reader.readline():
                answer = self._book.renew(LeaseReport.loads(line), time.monotonic())
                await self._save_shares()
                changed = {n: u for n, u in answer.usage.items() if told.get(n) != u}
                told |= changed
                writer.write(LeaseAnswer(answer.grants, answer.levels, changed).dumps())
                await writer.drain()
        except (ContractError, ValueError, OSError) as error:
            logger.error("A gateway's leases cannot be renewed: %s", error)
        finally:
            writer.close()

    async def _save_shares(self) -> None:
        """Save shares before the grants that give them are sent."""
        async with self._saving:
            shares = self._book.shares_to_save()
            if shares is None:
                return
            try:
                await self._save(shares)
            except OSError:
                self._book.mark_unsaved()
                raise


@asynccontextmanager
async def serving_leases(gateway_file: Path, socket: Path) -> AsyncIterator[None]:
    """Serve leases for the lifetime of the context.

    Args:
        gateway_file: the tenants with their limits.
        socket: Unix socket to listen on; shares are saved beside it.

    Raises:
        ModelsFileError: the file is invalid.
        OSError: it cannot be read.
    """
    tenants = _read_tenants(gateway_file)
    shares_file = socket.with_name(SHARES_FILE_NAME)
    book = LeaseBook(tenants, time.monotonic(), saved=_read_shares(shares_file))

    async def save(shares: Shares) -> None:
        write_atomically(shares_file, json.dumps(shares).encode(), 0o600)

    server = await asyncio.start_unix_server(
        LeaseServer(book, save).serve, str(socket), limit=MAX_LINE_BYTES
    )
    try:
        yield
    finally:
        server.close()


def _read_tenants(path: Path) -> tuple[TenantEntry, ...]:
    try:
        return GatewayFile.loads(path.read_bytes()).tenants
    except ContractError as error:
        raise ModelsFileError(f"{path}: {error}") from error


def _read_shares(path: Path) -> Shares | None:
    try:
        return parse_shares(path.read_bytes())
    except FileNotFoundError:
        return None
