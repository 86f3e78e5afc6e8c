"""The heaps of the C library and of Python: what is cached goes back, holes are filled."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping

MAX_FILLED_BYTES = 32 << 20  # resident, of a process, as they are never free again
POOL_BYTES = 16 << 10  # of Python's allocator, for blocks of one size
POOL_HEADER_BYTES = 48
MAX_BLOCK_BYTES = 512  # of Python's allocator; larger ones are malloc's
STEP_BYTES = 16
MALLOPT_OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_MMAP_THRESHOLD_": -3,
    "MALLOC_ARENA_MAX": -8,
}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX, by the variables that set them."""
MAX_HOLE_BYTES = 64 << 10
PAGE_BYTES = 4096


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def trim_heap() -> None:
    """Release free pages of the heap; does nothing unless the C library is glibc.

    Buffers below malloc's mmap threshold live on the heap, where a later allocation that is still
    in use keeps freed pages before it resident. Takes 0.1 to 0.4 ms.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def apply_malloc_variables(environment: Mapping[str, str]) -> None:
    """Set the C library's malloc as it sets itself by these variables when a process starts.

    For a forked process, which has the settings of its parent; does nothing without glibc.

    Args:
        environment: the process's; what is no number is ignored.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, option in MALLOPT_OPTIONS.items():
        value = environment.get(name, "")
        if set_option is not None and value.isdigit():
            set_option(option, int(value))


class HoleFiller:
    """Takes free blocks between those in use, for good, before a process forks.

    What a forked child allocates then lies on pages of its own, close together, instead of in
    holes all over the pages that it shares with its parent, each of which would be copied.

    Attributes:
        filled_bytes: resident memory that has been taken so far, `MAX_FILLED_BYTES` at most. Of a
            larger hole that is one page, which has the block's header: the others are released.
    """

    def __init__(self) -> None:
        self.filled_bytes = 0
        self._kept: list[bytes] = []

    def fill(self) -> None:
        """Release free pages, then fill the holes that there are; does nothing without glibc."""
        trim_heap()
        libc = ctypes.CDLL(None)
        if getattr(libc, "mallinfo2", None) is not None:  # glibc 2.33
            self._fill_heap(libc)
            self._fill_pools()

    def _fill_heap(self, libc: ctypes.CDLL) -> None:
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        libc.mallinfo2.restype = _Mallinfo
        top = libc.sbrk(0) - libc.mallinfo2().keepcost  # what is above has never been used
        for size in _hole_sizes():
            while self.filled_bytes + size <= MAX_FILLED_BYTES:
                block = libc.malloc(size)
                if not block or block >= top:
                    libc.free(block)
                    break
                self.filled_bytes += min(size, PAGE_BYTES)

    def _fill_pools(self) -> None:
        """Fill the pools of Python's allocator, until it begins another one."""
        header_bytes = sys.getsizeof(b"")
        for size in range(3 * STEP_BYTES, MAX_BLOCK_BYTES + 1, STEP_BYTES):
            while self.filled_bytes + size <= MAX_FILLED_BYTES:
                block = bytes(size - header_bytes)
                self._kept.append(block)
                self.filled_bytes += size
                if id(block) % POOL_BYTES == POOL_HEADER_BYTES:  # the first one of a pool
                    break


def _hole_sizes() -> Iterator[int]:
    size = MAX_HOLE_BYTES
    while size > MAX_BLOCK_BYTES:
        yield size
        size = size * 3 // 4
    yield from range(MAX_BLOCK_BYTES - 8, 0, -STEP_BYTES)


HOLES = HoleFiller()
"""This process's."""
