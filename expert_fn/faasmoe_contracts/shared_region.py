"""Shared memory between a router and a sandbox on one machine, for large frames.

A region is an anonymous memfd, so nothing is left behind when a process is killed. It is sealed, so
neither side can shrink it under the other. The sandbox opens it through /proc as a descriptor of
the Unix socket's peer, whose process ID comes from the kernel (`unix_socket.peer_pid`): a client
cannot make it map the memory of another process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import Self

from faasmoe_contracts.wire import MAX_FRAME_BYTES

REGION_HEADER = "x-faasmoe-region"
"""Header that offers a region. Request: descriptor and size in bytes. Response: size in bytes."""

FRAME_HEADER = "x-faasmoe-frame"
"""Header of a frame in the region. Request: size in bytes. Response: offset and size in bytes."""

MAX_REGION_BYTES = 4 * MAX_FRAME_BYTES
MAX_MAILBOX_BYTES = 5 * MAX_FRAME_BYTES
MAILBOX_PATH = "/v1/mailbox"
"""Path of the request that offers a mailbox, see docs/wire.md, "Mailboxes"."""

MEMFD_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedRegion:
    """A mapped region; unmapped once it and all views of it are garbage-collected.

    Attributes:
        view: all bytes of the region.
        descriptor: descriptor for the other process to open; -1 once closed.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, size_bytes)
        self.view = memoryview(self._mapping)

    @classmethod
    def create(cls, size_bytes: int) -> Self:
        """Create a sealed region of `size_bytes` bytes; raises OSError."""
        descriptor = create_sealed_memory("faasmoe-frames", size_bytes)
        try:
            return cls(descriptor, size_bytes)
        except OSError:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, pid: int, descriptor: int, size_bytes: int) -> Self:
        """Map a region that another process created.

        Args:
            pid: the other process.
            descriptor: number of its descriptor.
            size_bytes: expected size.

        Raises:
            OSError: it cannot be opened, is not a sealed memfd, or has another size.
        """
        own_descriptor = open_sealed_memory(pid, descriptor, size_bytes)
        try:
            region = cls(own_descriptor, size_bytes)
        except OSError:
            os.close(own_descriptor)
            raise
        region.close_descriptor()
        return region

    def release_pages(self) -> None:
        """Free the pages for both sides; they read as zeros when used again."""
        self._mapping.madvise(mmap.MADV_REMOVE)

    def close_descriptor(self) -> None:
        """Close the descriptor and keep the mapping; calling it again has no effect."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def create_sealed_memory(name: str, size_bytes: int) -> int:
    """Return a descriptor of new anonymous memory, sealed against resizing; raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, MEMFD_SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_sealed_memory(pid: int, descriptor: int, size_bytes: int) -> int:
    """Return an own descriptor of memory that another process created.

    Args:
        pid: the other process.
        descriptor: number of its descriptor.
        size_bytes: expected size.

    Raises:
        OSError: it cannot be opened, is not a sealed memfd, or has another size.
    """
    # Non-blocking, because the descriptor may be anything, such as a pipe.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    own_descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", flags)
    try:
        status = os.fstat(own_descriptor)
        is_sealed = fcntl.fcntl(own_descriptor, fcntl.F_GET_SEALS) & MEMFD_SEALS == MEMFD_SEALS
        if not stat.S_ISREG(status.st_mode) or not is_sealed or status.st_size != size_bytes:
            raise OSError(
                f"descriptor {descriptor} of process {pid}: got {status.st_size} bytes, "
                f"sealed: {is_sealed}, expected {size_bytes} bytes of sealed memory"
            )
    except OSError:
        os.close(own_descriptor)
        raise
    return own_descriptor
