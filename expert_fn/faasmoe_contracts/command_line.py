"""The command line that `ps` shows of this process; a forked one shows that of its parent.

Linux only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

_FIRST_FIELD = 3  # behind the name in /proc/PID/stat, as in proc(5)
_ARG_START, _ARG_END = 48, 49


def show_command(words: Sequence[str]) -> None:
    """Show this process as run by a command; what is longer than the command that was is cut off.

    Args:
        words: the command line.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = (int(fields[number - _FIRST_FIELD]) for number in (_ARG_START, _ARG_END))
    size_bytes = end - start
    text = b"".join(word.encode() + b"\0" for word in words)[: max(0, size_bytes - 1)]
    ctypes.memmove(start, text.ljust(size_bytes, b"\0"), size_bytes)
