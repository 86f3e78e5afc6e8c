"""Memory of a process, as the operating system counts it."""

from __future__ import annotations

import re
from pathlib import Path

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def pss_bytes(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Return the proportional set size of a process in bytes.

    A page that N processes share counts 1/N in each, so the sum over processes is the memory that
    they really use. None if the process has exited or belongs to another user.
    """
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    found = _PSS.search(text)
    return int(found[1]) * 1024 if found else None
