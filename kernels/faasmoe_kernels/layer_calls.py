"""The router's native calls: one MoE layer through mailboxes and local functions.

See layer_call.h. Addresses of memory are plain integers, as in `library`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from faasmoe_kernels.function_layers import (
    CallsError,
    FunctionLayer,
    FunctionLayerStruct,
    to_layer_structs,
)
from faasmoe_kernels.library import KernelDtype, KernelLibrary
from faasmoe_kernels.sandbox_loop import SlotStatus

MAX_REPLICAS = 8
N_SIZE_CLASSES = 16
MAX_FUNCTIONS_PER_FRAME = 8
MAX_EVENTS = 8192
DONE, GENERAL = 0, 1  # results of begin and finish


class CallEnd(IntEnum):
    """How a call through a mailbox ended."""

    OK = 0
    LATE = 1
    DEAD = 2
    BROKEN = 3
    DECLINED = 4
    STOPPED = 5


class _Route(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int64),
        ("local", ctypes.c_int64),
        ("n_mailboxes", ctypes.c_int64),
        ("mailboxes", ctypes.c_int64 * MAX_REPLICAS),
        ("id", ctypes.c_char * 64),
    )


class _LayerRoutes(ctypes.Structure):
    _fields_ = (
        ("function_of", ctypes.c_void_p),
        ("n_experts", ctypes.c_int64),
        ("routes", ctypes.POINTER(_Route)),
        ("n_routes", ctypes.c_int64),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        ("store_dtype", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("max_rows_per_expert", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("call_timeout_s", ctypes.c_double),
        ("hedge_s", ctypes.c_double * N_SIZE_CLASSES),
        ("abandon_s", ctypes.c_double * N_SIZE_CLASSES),
    )


_EVENT_FIELDS = struct.Struct("qdiiii32s")
"""Of a fk_call_event, in the order of CallEvent's; every call has one, so they are read at once."""


class _FunctionTotals(ctypes.Structure):
    _fields_ = (
        ("offset_s", ctypes.c_double),
        ("n_in_flight", ctypes.c_int64),
        ("calls", ctypes.c_int64),
        ("rows", ctypes.c_int64),
    )


class _Totals(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int64),
        ("calls", ctypes.c_int64),
        ("local_calls", ctypes.c_int64),
        ("general_layers", ctypes.c_int64),
        ("sent_bytes", ctypes.c_int64),
        ("received_bytes", ctypes.c_int64),
        ("layers_s", ctypes.c_double),
    )


class _Left(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int64),
        ("layers_s", ctypes.c_double),
        ("events", ctypes.c_int64),
        ("faults", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Route:
    """How one function of a layer is reached; neither mailboxes nor local: not natively.

    Attributes:
        function: index of its totals.
        function_id: its id.
        mailboxes: handles of the replicas that may be called now.
        local: handle of the function in this process; 0 to call it.
    """

    function: int
    function_id: str
    mailboxes: tuple[int, ...] = ()
    local: int = 0


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """The functions of one layer.

    Attributes:
        function_of: address of the position of each expert's function, int32 [n_experts].
        n_experts: number of experts.
        routes: the functions.
    """

    function_of: int
    n_experts: int
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What holds for all calls.

    Attributes:
        store_dtype: dtype of frames.
        max_rows: larger batches take the general path.
        max_rows_per_expert: as do batches with more rows of one expert; 0 for any number.
        n_threads: threads of local functions while no call is in flight.
        call_timeout_s: after which an answer is late in any case.
        hedge_s: after which it is late if there is another replica, by the bit length of its rows.
        abandon_s: after which it is late if there is none.
    """

    store_dtype: KernelDtype
    max_rows: int
    max_rows_per_expert: int
    n_threads: int
    call_timeout_s: float
    hedge_s: tuple[float, ...]
    abandon_s: tuple[float, ...]


class CallEvent(NamedTuple):
    """One call that ended.

    Attributes:
        mailbox: handle of its mailbox.
        elapsed_s: time since it was sent.
        layer: index of the MoE layer.
        rows: rows that it carried; 0 if it is no call, but a mailbox closed while not in use.
        end: how it ended.
        status: the sandbox's answer.
        detail: the invalid field, or what failed.
    """

    mailbox: int
    elapsed_s: float
    layer: int
    rows: int
    end: CallEnd
    status: SlotStatus
    detail: str


@dataclass(frozen=True, slots=True)
class FunctionTotals:
    """Totals of one function.

    Attributes:
        offset_s: the integral of its calls in flight up to time t is offset_s + n_in_flight * t.
        n_in_flight: calls in flight.
        calls: calls that were answered.
        rows: rows that these calls carried.
    """

    offset_s: float
    n_in_flight: int
    calls: int
    rows: int


@dataclass(frozen=True, slots=True)
class CallTotals:
    """Totals since the start.

    Attributes:
        layers: layers computed natively.
        calls: calls to sandboxes.
        local_calls: functions computed in this process.
        general_layers: layers left to the general path.
        sent_bytes: size of request frames.
        received_bytes: size of response frames.
        layers_s: time of native layers.
    """

    layers: int
    calls: int
    local_calls: int
    general_layers: int
    sent_bytes: int
    received_bytes: int
    layers_s: float


class CallsLeft(NamedTuple):
    """What layers have left that was not taken yet.

    Attributes:
        layers: total of layers computed natively.
        layers_s: their time.
        events: calls that `take_events` would return.
        faults: those of them that did not end well.
    """

    layers: int
    layers_s: float
    events: int
    faults: int


class LayerCalls:
    """Computes layers; `begin` and `finish` belong to one thread, the rest to any.

    Args:
        library: the kernel library.

    Attributes:
        context: address of the native object, the first argument of the functions at
            `begin_address` and `finish_address`.
        begin_address: int32_t (*)(void *context, int64_t layer, int64_t rows, int64_t hidden_size,
            int64_t top_k, const float *hidden, const int64_t *top_k_index, const float *weight)
        finish_address: int32_t (*)(void *context, int64_t layer, float *out)
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._lib = ctypes.CDLL(str(library.path))
        _declare_functions(self._lib)
        # With the GIL: these take microseconds, after which another thread may hold it for long.
        quick = ctypes.PyDLL(str(library.path))
        _declare_functions(quick)
        self._quick = quick
        self._begin = quick.fk_calls_begin_dtype
        self._finish = self._lib.fk_calls_finish_dtype
        self.context: int = self._lib.fk_calls_new()
        self.begin_address = _address(self._lib.fk_calls_begin)
        self.finish_address = _address(self._lib.fk_calls_finish)
        self._events = ctypes.create_string_buffer(MAX_EVENTS * _EVENT_FIELDS.size)
        self._seconds = (ctypes.c_double * MAX_EVENTS)()
        self._left = _Left()
        self._left_address = ctypes.addressof(self._left)

    def begin(
        self,
        layer: int,
        rows: int,
        hidden_size: int,
        top_k: int,
        hidden: int,
        dtype: KernelDtype,
        top_k_index: int,
        top_k_weight: int,
    ) -> bool:
        """Send a layer's calls; return False if it takes the general path.

        Args:
            layer: index of the MoE layer.
            rows: number of rows T.
            hidden_size: H.
            top_k: k.
            hidden: address of [T, H], contiguous; unchanged until the layer is finished.
            dtype: its type.
            top_k_index: address of int64 [T, k].
            top_k_weight: address of float32 [T, k].

        Raises:
            CallsError: an argument cannot be used.
        """
        return self._is_done(
            self._begin(
                *(self.context, layer, rows, hidden_size, top_k),
                *(hidden, dtype, top_k_index, top_k_weight),
            )
        )

    def finish(self, layer: int, out: int, dtype: KernelDtype) -> bool:
        """Write the layer's output [T, H]; return False if it takes the general path.

        Raises:
            CallsError: the layer was not begun.
        """
        return self._is_done(self._finish(self.context, layer, out, dtype))

    def n_in_flight(self) -> int:
        """Return the calls that were sent and not collected."""
        return int(self._lib.fk_calls_n_in_flight(self.context))

    def add_mailbox(
        self,
        descriptor: int,
        size_bytes: int,
        *,
        n_slots: int,
        request_bytes: int,
        response_bytes: int,
        socket: int,
    ) -> int:
        """Write a mailbox into memory; return its handle.

        Args:
            descriptor: memory of `mailbox_bytes` bytes; may be closed afterwards.
            size_bytes: size of the memory.
            n_slots: frames at once.
            request_bytes: maximum size of a request frame, a multiple of 64.
            response_bytes: maximum size of a response frame, a multiple of 64.
            socket: connection to the sandbox, which is duplicated: its end is the mailbox's.

        Raises:
            CallsError: the memory or the sizes cannot be used.
        """
        handle = int(
            self._lib.fk_calls_add_mailbox(
                self.context, descriptor, size_bytes, n_slots, request_bytes, response_bytes, socket
            )
        )
        self._check(handle)
        return handle

    def remove_mailbox(self, mailbox: int) -> None:
        """Stop using a mailbox."""
        self._check(self._lib.fk_calls_remove_mailbox(self.context, mailbox))

    def add_local(self, layers: Sequence[FunctionLayer]) -> int:
        """Add a function of this process, whose weights must stay; return its handle."""
        handle = int(
            self._lib.fk_calls_add_local(self.context, to_layer_structs(layers), len(layers))
        )
        self._check(handle)
        return handle

    def remove_local(self, local: int) -> bool:
        """Stop using a function; return False while a layer computes with it: try again then."""
        status = self._lib.fk_calls_remove_local(self.context, local)
        self._check(status)
        return not status

    def publish(self, version: int, layers: Sequence[LayerRoutes]) -> None:
        """Replace all routes; raises CallsError."""
        structs = (_LayerRoutes * len(layers))(*map(_to_layer_struct, layers))
        self._check(self._lib.fk_calls_publish(self.context, version, structs, len(layers)))

    def configure(self, settings: CallSettings) -> None:
        """Replace the settings, from the next layer on."""
        raw = _Settings(
            *(settings.store_dtype, settings.max_rows, settings.max_rows_per_expert),
            *(settings.n_threads, settings.call_timeout_s),
            (ctypes.c_double * N_SIZE_CLASSES)(*settings.hedge_s),
            (ctypes.c_double * N_SIZE_CLASSES)(*settings.abandon_s),
        )
        self._quick.fk_calls_configure(self.context, ctypes.byref(raw))

    def left(self) -> CallsLeft:
        """Return what there is to take; for one thread, which cares for costs."""
        self._quick.fk_calls_read_left(self.context, self._left_address)
        left = self._left
        return CallsLeft(left.layers, left.layers_s, left.events, left.faults)

    def take_events(self) -> list[CallEvent]:
        """Return the calls that ended since the last time."""
        n = self._quick.fk_calls_take_events(self.context, self._events, MAX_EVENTS)
        return [
            _to_event(*_EVENT_FIELDS.unpack_from(self._events, i * _EVENT_FIELDS.size))
            for i in range(n)
        ]

    def take_layer_seconds(self) -> list[float]:
        """Return the times of layers since the last time, in seconds."""
        n = self._quick.fk_calls_take_layer_seconds(self.context, self._seconds, MAX_EVENTS)
        return self._seconds[:n]

    def take_pairs(self, n_routes: int) -> list[int]:
        """Return the pairs of each function of each layer since the last time."""
        pairs = (ctypes.c_int64 * n_routes)()
        self._quick.fk_calls_take_pairs(self.context, pairs, n_routes)
        return list(pairs)

    def totals(self, n_functions: int) -> tuple[CallTotals, list[FunctionTotals]]:
        """Return the totals of all calls, and of the first `n_functions` functions."""
        totals, functions = _Totals(), (_FunctionTotals * n_functions)()
        self._quick.fk_calls_read_totals(self.context, ctypes.byref(totals), functions, n_functions)
        return (
            CallTotals(*(getattr(totals, name) for name, _ in _Totals._fields_)),
            [FunctionTotals(f.offset_s, f.n_in_flight, f.calls, f.rows) for f in functions],
        )

    def release_memory(self) -> None:
        """Free what mailboxes keep for their next calls, unless a layer is being computed."""
        self._lib.fk_calls_release_memory(self.context)

    def __del__(self) -> None:
        """Release everything, once no other thread can read the totals any more."""
        if context := getattr(self, "context", 0):
            self._lib.fk_calls_free(context)

    def _is_done(self, result: int) -> bool:
        self._check(result)
        return not result

    def _check(self, status: int) -> None:
        if status < 0:
            raise CallsError(self._lib.fk_calls_error().decode())


_ENDS = {int(end): end for end in CallEnd}
_STATUSES = {int(status): status for status in SlotStatus}


def _to_event(
    mailbox: int, elapsed_s: float, layer: int, rows: int, end: int, status: int, detail: bytes
) -> CallEvent:
    return CallEvent(
        *(mailbox, elapsed_s, layer, rows, _ENDS[end]),
        _STATUSES.get(status, SlotStatus.FAILED),
        detail.partition(b"\0")[0].decode("utf-8", "replace"),
    )


def mailbox_bytes(
    library: KernelLibrary, *, n_slots: int, request_bytes: int, response_bytes: int
) -> int:
    """Return the size in bytes of the memory of such a mailbox."""
    lib = ctypes.CDLL(str(library.path))
    lib.fk_mailbox_size.restype = ctypes.c_int64
    return int(lib.fk_mailbox_size(n_slots, request_bytes, response_bytes))


def _to_layer_struct(layer: LayerRoutes) -> _LayerRoutes:
    routes = (_Route * len(layer.routes))(
        *(
            _Route(
                *(r.function, r.local, len(r.mailboxes)),
                (ctypes.c_int64 * MAX_REPLICAS)(*r.mailboxes),
                r.function_id.encode(),
            )
            for r in layer.routes
        )
    )
    return _LayerRoutes(layer.function_of, layer.n_experts, routes, len(layer.routes))


def _address(function: object) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)  # type: ignore[arg-type]


def _declare_functions(lib: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.fk_calls_error.restype = ctypes.c_char_p
    lib.fk_calls_new.restype = pointer
    lib.fk_calls_free.argtypes = (pointer,)
    lib.fk_calls_free.restype = None
    lib.fk_calls_begin_dtype.argtypes = (pointer, i64, i64, i64, i64, pointer, i32, *[pointer] * 2)
    lib.fk_calls_finish_dtype.argtypes = (pointer, i64, pointer, i32)
    lib.fk_calls_release_memory.argtypes = (pointer,)
    lib.fk_calls_release_memory.restype = None
    lib.fk_calls_n_in_flight.argtypes = (pointer,)
    lib.fk_calls_add_mailbox.argtypes = (pointer, i32, i64, i32, i32, i32, i32)
    lib.fk_calls_add_mailbox.restype = i64
    lib.fk_calls_remove_mailbox.argtypes = (pointer, i64)
    lib.fk_calls_add_local.argtypes = (pointer, ctypes.POINTER(FunctionLayerStruct), i64)
    lib.fk_calls_add_local.restype = i64
    lib.fk_calls_remove_local.argtypes = (pointer, i64)
    lib.fk_calls_publish.argtypes = (pointer, i64, ctypes.POINTER(_LayerRoutes), i64)
    lib.fk_calls_configure.argtypes = (pointer, ctypes.POINTER(_Settings))
    lib.fk_calls_configure.restype = None
    lib.fk_calls_read_left.argtypes = (pointer, pointer)
    lib.fk_calls_read_left.restype = None
    for name in ("fk_calls_take_events", "fk_calls_take_layer_seconds"):
        getattr(lib, name).argtypes = (pointer, pointer, i64)
        getattr(lib, name).restype = i64
    lib.fk_calls_take_pairs.argtypes = (pointer, pointer, i64)
    lib.fk_calls_take_pairs.restype = None
    lib.fk_calls_read_totals.argtypes = (pointer, pointer, pointer, i64)
    lib.fk_calls_read_totals.restype = None
