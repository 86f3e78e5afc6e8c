"""How much memory a process really costs: its proportional set size.

A page that N processes share counts 1/N in each, so that the sum over processes is what the machine
spends.
"""

from __future__ import annotations

import re
from pathlib import Path

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def pss_bytes(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Return the PSS of a process, or None if it is gone or not ours to look at."""
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    found = _PSS.search(text)
    return int(found[1]) * 1024 if found else None


def format_bytes(size_bytes: float | None) -> str:
    """Return a size as people read it, in units of 1024."""
    if size_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
