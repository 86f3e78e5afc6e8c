"""Memory that is reserved but holds nothing: given back to the system until it is used.

torch zeroes a new cache by writing to all of it, so an idle router on CPU would hold its whole KV
cache resident: 1.8 GB of a 2 GB budget, seen with the demo model. And what requests have written
stays when they have ended, in the cache as in the heap.
"""

import ctypes
import logging
import mmap
import os
from collections.abc import Callable

from torch import Tensor

from faasmoe_expert import malloc

logger = logging.getLogger(__name__)

IDLE_RECLAIM_DELAY_S = 1.0
PREFIX_CACHE_RECLAIM_DELAY_S = 60.0
"""Where prompts' beginnings are kept for later requests, they are worth more than their memory."""


class IdleMemoryReclaimer:
    """Gives back what requests took, once there has been none for a while.

    Belongs to the thread that computes, so that nothing is computed meanwhile.

    Args:
        cache: the KV cache.
        forget: has nobody look for what an ended request has left in the cache.
        after_s: for how long there must have been no request.

    Attributes:
        also: gives back what others keep for requests; is called with the rest.
    """

    def __init__(
        self,
        cache: Tensor,
        *,
        evict_cached_blocks: Callable[[], object],
        idle_delay_s: float = IDLE_RECLAIM_DELAY_S,
    ) -> None:
        self.on_reclaim: Callable[[], None] = lambda: None
        self._cache = cache
        self._evict_cached_blocks = evict_cached_blocks
        self._idle_delay_s = idle_delay_s
        self._idle_since_s: float | None = None
        self._has_unreclaimed = False

    def observe(self, now_s: float, *, is_idle: bool) -> None:
        """Take whether there is a request at this moment, on a clock that only goes forward."""
        if not is_idle:
            self._idle_since_s, self._has_unreclaimed = None, True
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif self._has_unreclaimed and now_s - self._idle_since_s >= self._idle_delay_s:
            self._has_unreclaimed = False
            self._evict_cached_blocks()
            release_pages(self._cache)
            self.on_reclaim()
            malloc.trim_heap()


def release_pages(tensor: Tensor) -> None:
    """Let go of the pages within a CPU tensor; they come back, as zeros, on use."""
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
        # Only a saving is lost.
        logger.warning("madvise on the KV cache: %s", os.strerror(ctypes.get_errno()))
