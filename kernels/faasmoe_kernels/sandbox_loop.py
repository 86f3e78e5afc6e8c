"""A sandbox's mailboxes: request frames that the library computes without Python.

Python publishes functions, opens and closes mailboxes, and reads counters; see sandbox_loop.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from faasmoe_kernels.function_layers import (
    CallsError,
    FunctionLayer,
    FunctionLayerStruct,
    to_layer_structs,
)
from faasmoe_kernels.library import KernelLibrary

N_BUCKETS = 12
"""Buckets of compute times, the unbounded one included."""


class SlotStatus(IntEnum):
    """How a sandbox answers a frame in a mailbox; all but OK send the router to HTTP."""

    OK = 0
    NOT_ORDINARY = 1
    UNKNOWN_FUNCTION = 2
    STORE_CHANGED = 3
    DRAINING = 4
    EXPIRED = 5
    BAD_FRAME = 6
    FAILED = 7


class _Counters(ctypes.Structure):
    _fields_ = (
        ("frames", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("statuses", ctypes.c_int64 * len(SlotStatus)),
        ("seconds_buckets", ctypes.c_int64 * N_BUCKETS),
        ("seconds_sum", ctypes.c_double),
        ("n_running", ctypes.c_int64),
        ("n_mailboxes", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class SandboxCounters:
    """What a sandbox computed on its mailboxes.

    Attributes:
        frames: frames computed.
        rows: rows of hidden states computed.
        statuses: answers by status.
        seconds_buckets: computations by time, one count per bucket.
        seconds_sum: time spent computing.
        n_running: frames being computed or waiting for their turn.
        n_mailboxes: open mailboxes.
    """

    frames: int
    rows: int
    statuses: dict[SlotStatus, int]
    seconds_buckets: tuple[int, ...]
    seconds_sum: float
    n_running: int
    n_mailboxes: int


class SandboxLoop:
    """Serves mailboxes with native threads. Its methods may be called from any thread.

    Args:
        library: the kernel library.
        n_threads: threads that compute a frame, the mailbox's own included.
        bounds_s: ascending upper bounds of the N_BUCKETS - 1 bounded buckets of compute times.
    """

    def __init__(
        self, library: KernelLibrary, *, n_threads: int, bounds_s: Sequence[float]
    ) -> None:
        if len(bounds_s) != N_BUCKETS - 1:
            raise CallsError(f"bounds_s: got {len(bounds_s)}, expected {N_BUCKETS - 1}")
        self._lib = ctypes.CDLL(str(library.path))
        _declare_functions(self._lib)
        bounds = (ctypes.c_double * len(bounds_s))(*bounds_s)
        self._sandbox: int | None = self._lib.fk_sandbox_new(n_threads, bounds)

    def publish(self, function_id: str, layers: Sequence[FunctionLayer]) -> None:
        """Compute frames of a function, whose weights must stay until it is retracted.

        Raises:
            CallsError: the id or a layer cannot be used.
        """
        structs = to_layer_structs(layers)
        self._check(
            self._lib.fk_sandbox_publish(self._sandbox, function_id.encode(), structs, len(layers))
        )

    def retract(self, function_id: str) -> None:
        """Forget a function, after the frames that are being computed with it."""
        self._lib.fk_sandbox_retract(self._sandbox, function_id.encode())

    def function_frames(self, function_id: str) -> int:
        """Return the frames computed with a function since it was published."""
        return int(self._lib.fk_sandbox_function_frames(self._sandbox, function_id.encode()))

    def open(self, descriptor: int, size_bytes: int) -> int:
        """Serve a mailbox in the memory of `descriptor`, which may be closed; return its handle.

        Raises:
            CallsError: the memory holds no mailbox of this version, or there are too many.
        """
        handle = int(self._lib.fk_sandbox_open(self._sandbox, descriptor, size_bytes))
        self._check(handle)
        return handle

    def close(self, mailbox: int) -> None:
        """Stop serving a mailbox, after the frame that is being computed."""
        self._lib.fk_sandbox_close(self._sandbox, mailbox)

    def mailbox_frames(self, mailbox: int) -> int:
        """Return the frames answered on a mailbox so far."""
        return int(self._lib.fk_sandbox_mailbox_frames(self._sandbox, mailbox))

    def drain(self) -> None:
        """Decline all further frames."""
        self._lib.fk_sandbox_drain(self._sandbox)

    def counters(self) -> SandboxCounters:
        """Return the counters since the start."""
        raw = _Counters()
        self._lib.fk_sandbox_read_counters(self._sandbox, ctypes.byref(raw))
        return SandboxCounters(
            raw.frames,
            raw.rows,
            {status: raw.statuses[status] for status in SlotStatus},
            tuple(raw.seconds_buckets),
            raw.seconds_sum,
            raw.n_running,
            raw.n_mailboxes,
        )

    def free(self) -> None:
        """Close all mailboxes and release everything; calling it again has no effect."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            self._lib.fk_sandbox_free(sandbox)

    def _check(self, status: int) -> None:
        if status < 0:
            raise CallsError(self._lib.fk_calls_error().decode())


def _declare_functions(lib: ctypes.CDLL) -> None:
    pointer, i32, i64, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    lib.fk_calls_error.restype = text
    lib.fk_sandbox_new.argtypes = (i32, pointer)
    lib.fk_sandbox_new.restype = pointer
    lib.fk_sandbox_free.argtypes = (pointer,)
    lib.fk_sandbox_free.restype = None
    lib.fk_sandbox_publish.argtypes = (pointer, text, ctypes.POINTER(FunctionLayerStruct), i64)
    lib.fk_sandbox_retract.argtypes = (pointer, text)
    lib.fk_sandbox_retract.restype = None
    lib.fk_sandbox_function_frames.argtypes = (pointer, text)
    lib.fk_sandbox_function_frames.restype = i64
    lib.fk_sandbox_open.argtypes = (pointer, i32, i64)
    lib.fk_sandbox_open.restype = i64
    lib.fk_sandbox_close.argtypes = (pointer, i64)
    lib.fk_sandbox_close.restype = i64
    lib.fk_sandbox_mailbox_frames.argtypes = (pointer, i64)
    lib.fk_sandbox_mailbox_frames.restype = i64
    lib.fk_sandbox_drain.argtypes = (pointer,)
    lib.fk_sandbox_drain.restype = None
    lib.fk_sandbox_read_counters.argtypes = (pointer, ctypes.POINTER(_Counters))
    lib.fk_sandbox_read_counters.restype = None
