"""How much memory a process of this machine really costs: its proportional set size.

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
