"""Memory that a router and a sandbox of one machine share, for large frames.

Anonymous (a memfd), so that nothing is left behind when a process is killed, and sealed, so that
neither side can shrink it under the other. The sandbox opens it as a descriptor of the process that
is at the other end of its Unix socket, as the kernel names it: nobody else's memory can be meant.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import struct
from typing import Self

from faasmoe_contracts.wire import MAX_FRAME_BYTES

REGION_HEADER = "x-faasmoe-region"
"""Of a request: descriptor and size in bytes of memory to share; of its answer: that size."""

FRAME_HEADER = "x-faasmoe-frame"
"""Of a request: size of the frame that lies at the beginning; of an answer: its place and size."""

MAX_REGION_BYTES = 4 * MAX_FRAME_BYTES

MEMFD_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid and gid of the other end; unix(7), SO_PEERCRED


class SharedRegion:
    """A mapping, given back when nobody has a view of it any more.

    Attributes:
        view: all of its bytes.
        descriptor: for the other process to open; -1 once it need not.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, size_bytes)
        self.view = memoryview(self._mapping)

    @classmethod
    def create(cls, size_bytes: int) -> Self:
        """Return new memory of so many bytes; raises OSError."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        descriptor = os.memfd_create("faasmoe-frames", flags)
        try:
            os.ftruncate(descriptor, size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, MEMFD_SEALS)
            return cls(descriptor, size_bytes)
        except OSError:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, pid: int, descriptor: int, size_bytes: int) -> Self:
        """Return what another process has created.

        Raises:
            OSError: it cannot be opened, is no sealed memory, or has another size.
        """
        # Not blocking: the descriptor may be anything, a pipe too.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        own_descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", flags)
        try:
            status = os.fstat(own_descriptor)
            is_sealed = fcntl.fcntl(own_descriptor, fcntl.F_GET_SEALS) & MEMFD_SEALS == MEMFD_SEALS
            if not stat.S_ISREG(status.st_mode) or not is_sealed or status.st_size != size_bytes:
                raise OSError(
                    f"descriptor {descriptor} of process {pid}: got {status.st_size} bytes, sealed: "
                    f"{is_sealed}, expected {size_bytes} bytes of sealed memory"
                )
            region = cls(own_descriptor, size_bytes)
        except OSError:
            os.close(own_descriptor)
            raise
        region.close_descriptor()
        return region

    def release_pages(self) -> None:
        """Let go of the pages, for both sides; they come back, as zeros, on use."""
        self._mapping.madvise(mmap.MADV_REMOVE)

    def close_descriptor(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def peer_pid(connection: socket.socket) -> int | None:
    """Return the process at the other end of a Unix socket; None if there is none to be seen."""
    if connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size
    )
    pid: int = PEER_CREDENTIALS.unpack(credentials)[0]
    return pid or None  # 0: of another PID namespace
