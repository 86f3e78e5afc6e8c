"""How a router that has started makes way for others that start on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

FIRST_S = 3.0  # after which a router that was started for a request has answered it
PROC = Path("/proc")


def lower_priority_later(niceness: int, *, delay_s: float = FIRST_S) -> None:
    """Set the niceness of this process and its children after its first seconds.

    To be called while an event loop runs.

    Args:
        niceness: 0 to 19; a process without privileges cannot lower it again.
        delay_s: seconds until then.
    """
    asyncio.get_running_loop().call_later(delay_s, _lower_priority, os.getpid(), niceness)


def _lower_priority(pid: int, niceness: int) -> None:
    """Set the niceness of a process and its children; what they start inherits it."""
    with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
        for thread in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # the same
                os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
            for child in _children(thread):
                _lower_priority(child, niceness)


def _children(thread: Path) -> list[int]:
    """Return the children that a thread has started; none where the kernel does not tell."""
    try:
        return list(map(int, (thread / "children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []
