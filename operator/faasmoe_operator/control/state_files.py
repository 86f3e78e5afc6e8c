"""The ledger across restarts of `faasmoe up`: a small file beside the store.

Popularity across restarts of `faasmoe up`: a small file beside the store.

A file that is missing, damaged or of another model is as good as none, and a folder that cannot be
written costs a log line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faasmoe_operator.control.function_stats import (
    POPULARITY_DECODE_ERRORS,
    decode_popularity,
    encode_popularity,
)
from faasmoe_operator.control.usage_ledger import (
    LEDGER_DECODE_ERRORS,
    UsageLedger,
    decode_ledger,
    encode_ledger,
)

logger = logging.getLogger(__name__)


MAX_LEDGER_CHARS = 16 << 20


def usage_ledger_path(store: Path) -> Path:
    """Return the file of a store: in a folder beside it, as a store itself never changes."""
    return store.with_name(f"{store.name}.state") / "accounts.json"


class UsageLedgerFile:
    """Reads and writes the ledger of one model."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> UsageLedger:
        """Return the ledger, a new one if there is none; a damaged file is put aside."""
        try:
            return decode_ledger(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, *LEDGER_DECODE_ERRORS) as error:
            logger.error("%s is damaged and is moved aside: %s", self._path, error)
            self._quarantine()
        return UsageLedger(time.time())

    async def write(self, ledger: UsageLedger) -> bool:
        """Write the ledger in place of the last one; return whether that went well."""
        return await asyncio.to_thread(
            self._write, encode_ledger(ledger, max_chars=MAX_LEDGER_CHARS)
        )

    def _write(self, text: str) -> bool:
        temp_path = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temp_path.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temp_path.replace(self._path)
        except OSError as error:
            logger.error("%s: tenant usage cannot be saved: %s", self._path, error.strerror)
            return False
        return True

    def _quarantine(self) -> None:
        try:
            self._path.replace(self._path.with_suffix(".damaged"))
        except OSError as error:
            logger.error("%s cannot be moved aside: %s", self._path, error.strerror)


MAX_POPULARITY_BYTES = 16 << 20


def popularity_path(store: Path) -> Path:
    """Return the file of a store: in a folder beside it, as a store itself never changes."""
    return store.with_name(f"{store.name}.state") / "popularity.json"


class PopularityFile:
    """Reads and writes the counts of one model.

    Args:
        path: the file.
        model_digest: counts of another model are not taken.
        clock: the time of day, as runs are compared by it.
    """

    def __init__(
        self, path: Path, *, model_digest: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._model_digest = model_digest
        self._clock = clock

    def read(self) -> dict[str, float]:
        """Return the counts as they are now, nothing if there are none to use."""
        try:
            return decode_popularity(
                self._read_text(), model_digest=self._model_digest, now_s=self._clock()
            )
        except FileNotFoundError:
            return {}
        except (OSError, *POPULARITY_DECODE_ERRORS) as error:
            logger.warning("%s: not used: %s: %s", self._path, type(error).__name__, error)
            return {}

    def write(self, rows: Mapping[str, float]) -> None:
        """Write the counts in place of the last ones."""
        text = encode_popularity(rows, model_digest=self._model_digest, now_s=self._clock())
        temp_path = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temp_path.write_text(text)
            temp_path.replace(self._path)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self._path, error.strerror)

    def _read_text(self) -> str:
        if (size_bytes := self._path.stat().st_size) > MAX_POPULARITY_BYTES:
            raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_POPULARITY_BYTES}")
        return self._path.read_text(encoding="utf-8")
