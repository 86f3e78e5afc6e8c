"""Pages of mapped files that a process will hardly read again: the code of a zygote's libraries.

What a library runs once, while it is imported, stays mapped. A fork maps what it needs itself.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SMAPS = Path("/proc/self/smaps")


def release_unchanged_pages() -> None:
    """Unmap the pages of files that are as they are in the file; on Linux only.

    They stay in the page cache, and are mapped again when they are next read. A mapping of which
    the process has changed a page, such as relocated addresses, is left alone.
    """
    if not SMAPS.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in find_unchanged(SMAPS.read_text(encoding="utf-8").splitlines()):
        pages = (ctypes.c_void_p(start), ctypes.c_size_t(end - start))
        if libc.madvise(*pages, mmap.MADV_DONTNEED) != 0:  # locked memory
            logger.info("madvise of a mapping failed: %s", os.strerror(ctypes.get_errno()))


def find_unchanged(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of a process's mappings of files that it can only read and has not changed.

    Args:
        lines: of its `smaps` in `/proc`.
    """
    bounds: tuple[int, int] | None = None
    for line in lines:
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            start, _, end = words[0].partition("-")
            is_file = words[4] != "0" and "w" not in words[1]
            bounds = (int(start, 16), int(end, 16)) if is_file else None
        elif words[0] == "Anonymous:" and words[1] == "0" and bounds is not None:
            yield bounds
