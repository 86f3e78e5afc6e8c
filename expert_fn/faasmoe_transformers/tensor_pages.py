"""Returns the memory of tensors to the operating system, where their content is not needed."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)


def release_pages(tensor: Tensor) -> None:
    """Release the whole pages within a CPU tensor; they read as zeros when next used.

    Tensors on other devices are left alone. A failure is logged: only memory is lost.
    """
    if tensor.device.type == "cpu":
        _release(tensor)


def release_file_pages(tensor: Tensor) -> None:
    """Release the whole pages of a CPU tensor that is mapped from a file and was not written to.

    They stay in the page cache, and are mapped again when they are next read. Any other tensor is
    left alone.
    """
    if is_mapped_file(tensor):
        _release(tensor)


def is_mapped_file(tensor: Tensor) -> bool:
    """Return whether a tensor lies in a mapped file of this process."""
    if tensor.device.type != "cpu":
        return False
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, _, _, _, inode, *_ = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return inode != "0"
    return False


def _release(tensor: Tensor) -> None:
    page_bytes = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page_bytes) * page_bytes
    end = (tensor.data_ptr() + tensor.nbytes) // page_bytes * page_bytes
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_void_p(start), ctypes.c_size_t(end - start))
    if libc.madvise(*pages, mmap.MADV_DONTNEED) != 0:
        logger.warning("madvise of a tensor failed: %s", os.strerror(ctypes.get_errno()))
