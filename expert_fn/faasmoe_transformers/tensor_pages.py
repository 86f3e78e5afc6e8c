"""Returns the memory of tensors whose content is no longer needed to the operating system."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os

from torch import Tensor

logger = logging.getLogger(__name__)


def release_pages(tensor: Tensor) -> None:
    """Release the whole pages within a CPU tensor; they read as zeros when next used.

    Tensors on other devices are left alone. A failure is logged: only memory is lost.
    """
    if tensor.device.type != "cpu":
        return
    page_bytes = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page_bytes) * page_bytes
    end = (tensor.data_ptr() + tensor.nbytes) // page_bytes * page_bytes
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_void_p(start), ctypes.c_size_t(end - start))
    if libc.madvise(*pages, mmap.MADV_DONTNEED) != 0:
        logger.warning("madvise of a tensor failed: %s", os.strerror(ctypes.get_errno()))
