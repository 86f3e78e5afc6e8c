"""Popularity across restarts of `faasmoe up`: a small file beside the store.

A file that is missing, damaged or of another model is as good as none, and a folder that cannot be
written costs a log line.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faasmoe_operator.control.popularity_record import DAMAGED, decode, encode

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 << 20


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
        self._digest = model_digest
        self._clock = clock

    def read(self) -> dict[str, float]:
        """Return the counts as they are now, nothing if there are none to use."""
        try:
            return decode(self._text(), model_digest=self._digest, now_s=self._clock())
        except FileNotFoundError:
            return {}
        except (OSError, *DAMAGED) as error:
            logger.warning("%s: not used: %s: %s", self._path, type(error).__name__, error)
            return {}

    def write(self, rows: Mapping[str, float]) -> None:
        """Write the counts in place of the last ones."""
        text = encode(rows, model_digest=self._digest, now_s=self._clock())
        unfinished = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished.write_text(text)
            unfinished.replace(self._path)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self._path, error.strerror)

    def _text(self) -> str:
        if (size_bytes := self._path.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_FILE_BYTES}")
        return self._path.read_text(encoding="utf-8")
