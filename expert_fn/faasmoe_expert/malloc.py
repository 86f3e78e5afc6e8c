"""Returns memory that the C library caches to the operating system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Release free pages of the heap; does nothing unless the C library is glibc.

    Buffers below malloc's mmap threshold live on the heap, where a later allocation that is still
    in use keeps freed pages before it resident. Takes 0.1 to 0.4 ms.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
