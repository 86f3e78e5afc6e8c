"""How a router that has started makes way for others that start on the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

FIRST_S = 3.0  # after which a router that was started for a request has answered it
PROC = Path("/proc")


def lower_priority_later(niceness: int, *, delay_s: float = FIRST_S) -> None:
    """Set the niceness of this process's threads and its children after its first seconds.

    To be called while an event loop runs. The main thread keeps its own: it hands requests on, and
    ends the process, whose memory others wait for.

    Args:
        niceness: 0 to 19; a process without privileges cannot lower it again.
        delay_s: seconds until then.
    """
    asyncio.get_running_loop().call_later(
        delay_s, _lower_priority, os.getpid(), niceness, os.getpid()
    )


def _lower_priority(pid: int, niceness: int, kept: int) -> None:
    """Set the niceness of a process and its children; what they start inherits it.

    Args:
        pid: the process.
        niceness: the niceness.
        kept: the thread that keeps its own.
    """
    with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
        for thread in (PROC / str(pid) / "task").iterdir():
            if int(thread.name) != kept:
                with contextlib.suppress(ProcessLookupError):  # the same
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
            for child in _children(thread):
                _lower_priority(child, niceness, kept)


def _children(thread: Path) -> list[int]:
    """Return the children that a thread has started; none where the kernel does not tell."""
    try:
        return list(map(int, (thread / "children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []
