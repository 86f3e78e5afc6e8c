"""Popularity across restarts: a small JSON file beside the store, by the functions' shapes.

The file is no secret and no treasure: one that is missing, damaged or of another model is as good
as none, and a folder that cannot be written costs a log line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faasmoe_operator.control.popularity import HALF_LIFE_S

logger = logging.getLogger(__name__)

VERSION = 1
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
            return self._decayed(json.loads(self._text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s: not used: %s: %s", self._path, type(error).__name__, error)
            return {}

    def write(self, rows: Mapping[str, float]) -> None:
        """Write the counts in place of the last ones."""
        value = {
            "version": VERSION,
            "model_digest": self._digest,
            "written_at_s": round(self._clock(), 3),
            "rows": {shape: round(count, 3) for shape, count in rows.items()},
        }
        unfinished = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(value))
            unfinished.replace(self._path)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self._path, error.strerror)

    def _text(self) -> str:
        if (size_bytes := self._path.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"got {size_bytes} bytes, expected at most {MAX_FILE_BYTES}")
        return self._path.read_text(encoding="utf-8")

    def _decayed(self, value: Mapping[str, object]) -> dict[str, float]:
        if (value["version"], value["model_digest"]) != (VERSION, self._digest):
            return {}
        rows, written_at_s = value["rows"], value["written_at_s"]
        if not isinstance(rows, dict) or not isinstance(written_at_s, int | float):
            raise TypeError("rows: expected an object; written_at_s: expected a number")
        factor = 0.5 ** (max(0.0, self._clock() - written_at_s) / HALF_LIFE_S)
        return {str(shape): _count(count) * factor for shape, count in rows.items()}


def _count(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"rows: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"rows: got {value!r}, expected numbers of 0 or more")
    return float(value)
