"""Output shared by the benchmarks: summary statistics, machine description and JSON figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "out"
DISTRIBUTIONS = ("torch", "transformers", "aiohttp", "uvicorn", "uvloop", "httptools")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values))

    def format(self, digits: int = 0) -> str:
        """Return `median (low..high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile: the smallest value that `percent` % do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def describe_machine() -> dict[str, Any]:
    """Return hardware, software versions and current load of this machine."""
    return {
        "cpu": _read_field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes("MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min_at_start": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # some benchmarks do not need all of them
        return "not installed"


def memory_bytes(field: str) -> int:
    """Return a field of /proc/meminfo, such as MemTotal or MemAvailable."""
    return int(_read_field("/proc/meminfo", field).removesuffix(" kB")) * 1024


def write_figures(name: str, figures: Mapping[str, Any], *, folder: Path) -> Path:
    """Write `FOLDER/NAME.json` with each Spread as an object; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(figures, indent=2, default=_to_json)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _to_json(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"got {type(value).__name__}, expected a JSON value or a Spread")


def _read_field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
