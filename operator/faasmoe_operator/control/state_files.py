"""State that outlives a control process of `faasmoe up`: files in a folder beside the store.

A store never changes, so its state is in `STORE.state/`: tenants' usage in `accounts.json` and the
functions' popularity in `popularity.json`. Usage is never thrown away: a corrupted file is
quarantined. Popularity is only an optimisation: a missing, corrupted or foreign file counts as
empty. A folder that cannot be written costs a log line.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faasmoe_contracts.atomic_file import quarantine, write_atomically
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
MAX_POPULARITY_BYTES = 16 << 20


def usage_ledger_path(store: Path) -> Path:
    """Return the usage file of a store."""
    return _state_folder(store) / "accounts.json"


def popularity_path(store: Path) -> Path:
    """Return the popularity file of a store."""
    return _state_folder(store) / "popularity.json"


def _state_folder(store: Path) -> Path:
    return store.with_name(f"{store.name}.state")


class FileUsageStore:
    """Keeps the usage ledger of one model in a file; a UsageStore.

    Args:
        path: the file; its folder is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> UsageLedger:
        """Return the saved ledger; a new one if there is none or it is corrupted."""
        try:
            return decode_ledger(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, *LEDGER_DECODE_ERRORS) as error:
            logger.error("%s is damaged and is moved aside: %s", self._path, error)
            self._quarantine()
        return UsageLedger(time.time())

    async def write(self, ledger: UsageLedger) -> bool:
        """Replace the saved ledger; return whether that succeeded. Failures are logged."""
        text = encode_ledger(ledger, max_chars=MAX_LEDGER_CHARS)
        return await asyncio.to_thread(self._write, text)

    def _write(self, text: str) -> bool:
        try:
            _write_state(self._path, text)
        except OSError as error:
            logger.error("%s: tenant usage cannot be saved: %s", self._path, error.strerror)
            return False
        return True

    def _quarantine(self) -> None:
        try:
            quarantine(self._path)
        except OSError as error:
            logger.error("%s cannot be moved aside: %s", self._path, error.strerror)


class PopularityFile:
    """Keeps the functions' popularity of one model in a file.

    Args:
        path: the file; its folder is created if it does not exist.
        model_digest: digest of the store; the counts of another store are ignored.
        clock: returns seconds since the epoch, by which counts decay between two runs.
    """

    def __init__(
        self, path: Path, *, model_digest: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._model_digest = model_digest
        self._clock = clock

    def read(self) -> dict[str, float]:
        """Return the counts decayed to the present; empty if there are none to use."""
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
        """Replace the saved counts; a failure is logged.

        Args:
            rows: decayed rows by the functions' stable keys.
        """
        text = encode_popularity(rows, model_digest=self._model_digest, now_s=self._clock())
        try:
            _write_state(self._path, text)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self._path, error.strerror)

    def _read_text(self) -> str:
        if (size_bytes := self._path.stat().st_size) > MAX_POPULARITY_BYTES:
            raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_POPULARITY_BYTES}")
        return self._path.read_text(encoding="utf-8")


def _write_state(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, text, temp_path=path.with_suffix(".new"))
