"""The ledger across restarts of `faasmoe up`: a small file beside the store."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

from faasmoe_operator.control.ledger import Ledger
from faasmoe_operator.control.ledger_record import DAMAGED, decode, encode

logger = logging.getLogger(__name__)

MAX_FILE_CHARS = 16 << 20


def ledger_path(store: Path) -> Path:
    """Return the file of a store: in a folder beside it, as a store itself never changes."""
    return store.with_name(f"{store.name}.state") / "accounts.json"


class LedgerFile:
    """Reads and writes the ledger of one model."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Ledger:
        """Return the ledger, a new one if there is none; a damaged file is put aside."""
        try:
            return decode(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, *DAMAGED) as error:
            logger.error("%s cannot be read, and is put aside: %s", self._path, error)
            self._put_aside()
        return Ledger(time.time())

    async def write(self, ledger: Ledger) -> bool:
        """Write the ledger in place of the last one; return whether that went well."""
        return await asyncio.to_thread(self._write, encode(ledger, max_chars=MAX_FILE_CHARS))

    def _write(self, text: str) -> bool:
        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            logger.error("%s: the tenants' accounts cannot be kept: %s", self._path, error.strerror)
            return False
        return True

    def _put_aside(self) -> None:
        try:
            self._path.replace(self._path.with_suffix(".damaged"))
        except OSError as error:
            logger.error("%s cannot be put aside: %s", self._path, error.strerror)
