"""The shared library: its structures and functions, with addresses of memory as arguments.

Addresses are plain integers (`tensor.data_ptr()`, `array.ctypes.data`); the caller keeps the memory
alive and contiguous along the last dimension. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

ABI_VERSION = 8
OUT_OF_MEMORY = -2  # FK_E_MEMORY
LIBRARY_NAME = "libfaasmoe_kernels.so"
DISABLE_ENV = "FAASMOE_KERNELS"  # "off" leaves the library unused
ISA_ENV = "FAASMOE_KERNELS_ISA"  # instruction set to use in place of the best, to compare


class KernelsUnavailable(Exception):
    """The library is not built, was built for another version, or is switched off."""


class KernelError(ValueError):
    """The library rejected an argument of a call, which the message names."""


class KernelDtype(IntEnum):
    """Type of inputs and outputs."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class Scheme(IntEnum):
    """How the weights of a matrix are stored; see faasmoe_kernels.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    INT4 = 4
    MXFP4 = 5
    FP8 = 6
    NVFP4 = 7


class ParameterDtype(IntEnum):
    """Type of scales, zero points and biases in memory."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    E8M0 = 3  # uint8, 2 ** (code - 127); scales only
    UINT8 = 4  # zero points only
    E4M3 = 5  # uint8; scales of NVFP4 only


class Activation(IntEnum):
    """Activation of the first projection."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4
    SIGMOID = 5
    CLAMPED_SWIGLU = 6


class MatrixStruct(ctypes.Structure):
    """A Matrix as the library reads it (`fk_matrix`)."""

    _fields_ = (
        ("scheme", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale_dtype", ctypes.c_int32),
        ("zero_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("group_rows", ctypes.c_int32),
        ("codes_upper", ctypes.c_void_p),
        ("scales_upper", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("factors_upper", ctypes.c_void_p),
    )


class GatingStruct(ctypes.Structure):
    """struct fk_gating."""

    _fields_ = (
        ("activation", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class _Pairs(ctypes.Structure):
    _fields_ = (
        ("n_groups", ctypes.c_int64),
        ("group_sizes", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("n_out", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix [n, k] in memory.

    Attributes:
        scheme: how the weights are stored.
        n: output features.
        k: input features, contiguous.
        codes: address of the codes.
        scales: address of the scales, [n, k / group], or [n] without groups; 0 if unscaled.
        zeros: address of the zero points of INT8 and INT4, shaped as the scales, of codes counted
            from 0: the middle is 128 or 8; 0 for symmetric codes.
        bias: address of the bias, [n]; 0 without.
        group: columns per scale, a multiple of 32; 0 for one scale per row; 16 for NVFP4.
        scale_dtype: type of the scales; any but UINT8, and E4M3 for NVFP4 alone.
        zero_dtype: type of the zero points; any but E8M0 and E4M3.
        bias_dtype: type of the bias: FLOAT32, BFLOAT16 or FLOAT16.
        codes_upper: address of the codes of rows n/2 and above, if they do not follow those of the
            rows before them; 0 if they do.
        group_rows: rows that share their scales, of FP8 only: scales are [n / group_rows, k /
            group], both rounded up; 0 for one row.
        scales_upper: address of the scales of rows n/2 and above, if they do not follow those
            before them or begin a group of rows of their own; 0 otherwise, and with zero points.
        factors: address of the float32 number that multiplies the scales of NVFP4; 0 for 1.
        factors_upper: the same for rows n/2 and above; 0 for that of the rows before them.
    """

    scheme: Scheme
    n: int
    k: int
    codes: int
    scales: int = 0
    zeros: int = 0
    bias: int = 0
    group: int = 0
    scale_dtype: ParameterDtype = ParameterDtype.FLOAT32
    zero_dtype: ParameterDtype = ParameterDtype.FLOAT32
    bias_dtype: ParameterDtype = ParameterDtype.FLOAT32
    codes_upper: int = 0
    group_rows: int = 0
    scales_upper: int = 0
    factors: int = 0
    factors_upper: int = 0


@dataclass(frozen=True, slots=True)
class Gating:
    """What stands between an expert's two projections.

    Attributes:
        activation: applied to the gate, or to the only projection.
        is_gated: whether the first projection is gate and up, multiplied; else up alone.
        interleaved: whether rows of gate and up alternate (GPT-OSS) or gate comes first.
        alpha: factor of CLAMPED_SWIGLU.
        limit: bound of CLAMPED_SWIGLU.
    """

    activation: Activation
    is_gated: bool = True
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0


MATRIX_BYTES = ctypes.sizeof(MatrixStruct)
"""Size of one entry of `matrix_table`."""


class MappingGuard:
    """Keeps a truncated file from ending the process that reads its mapping; see guard_mapping.

    What cannot be read becomes zeros. Close it before the mapping.
    """

    def __init__(self, lib: ctypes.CDLL, slot: int) -> None:
        self._lib = lib
        self._slot: int | None = slot
        self._damaged = ctypes.c_int32.from_address(lib.fk_guard_damaged(slot))

    @property
    def is_damaged(self) -> bool:
        """Whether bytes could not be read, and are zeros until `restore`."""
        return self._slot is not None and bool(self._damaged.value)

    def restore(self, descriptor: int) -> None:
        """Map the file again; raises OSError."""
        if self._slot is not None and (code := self._lib.fk_guard_restore(self._slot, descriptor)):
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """End the guard."""
        if self._slot is not None:
            self._lib.fk_guard_remove(self._slot)
            self._slot = None


class KernelLibrary:
    """The loaded library. Calls may come from any thread.

    Attributes:
        path: file of the library.
    """

    def __init__(self, path: Path) -> None:
        """Load the library; raises KernelsUnavailable if it is missing or of another version."""
        self.path = path
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailable(f"{path}: {error}") from error
        try:
            version = self._lib.fk_abi_version()
            if version != ABI_VERSION:
                raise KernelsUnavailable(
                    f"{path}: got a library of ABI version {version}, expected {ABI_VERSION}; "
                    "install the package again"
                )
            self._declare_functions()
        except AttributeError as error:
            raise KernelsUnavailable(f"{path}: not a kernel library of FaaSMoE: {error}") from error

    def _declare_functions(self) -> None:
        i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        self._lib.fk_isa.restype = ctypes.c_char_p
        self._lib.fk_last_error.restype = ctypes.c_char_p
        self._lib.fk_set_isa.argtypes = (ctypes.c_char_p,)
        self._lib.fk_linear.argtypes = (
            *(ctypes.POINTER(MatrixStruct), pointer, i32, i64, i64),
            *(pointer, i32, i64, i32),
        )
        self._lib.fk_experts.argtypes = (
            *(pointer, pointer, ctypes.POINTER(GatingStruct), ctypes.POINTER(_Pairs)),
            *(pointer, i32, i64, i64, i32, pointer, i32, i64, i32),
        )
        self._lib.fk_layer_experts.argtypes = (
            *(i64, pointer, pointer, ctypes.POINTER(GatingStruct), ctypes.POINTER(_Pairs)),
            *(pointer, i32, i64, i64, pointer, i32),
        )
        self._lib.fk_guard_add.argtypes = (pointer, i64, i64)
        self._lib.fk_guard_damaged.argtypes = (i32,)
        self._lib.fk_guard_damaged.restype = pointer
        self._lib.fk_guard_restore.argtypes = (i32, i32)
        self._lib.fk_guard_remove.argtypes = (i32,)
        self._lib.fk_guard_remove.restype = None

    @property
    def isa(self) -> str:
        """Name of the instruction set in use: avx512_bf16, avx512, avx2, neon or portable."""
        name: bytes = self._lib.fk_isa()
        return name.decode()

    def use_isa(self, name: str) -> None:
        """Use another instruction set, for tests; raises KernelError if this CPU lacks it."""
        self.check(self._lib.fk_set_isa(name.encode()))

    def linear(
        self,
        weight: Matrix,
        *,
        x: int,
        x_dtype: KernelDtype,
        x_stride: int,
        rows: int,
        out: int,
        out_dtype: KernelDtype,
        n_threads: int = 1,
    ) -> None:
        """Write x @ weight.T (+ bias).

        Args:
            weight: the matrix [n, k].
            x: address of the input, [rows, k].
            x_dtype: its type.
            x_stride: elements from one row to the next.
            rows: number of rows.
            out: address of the output, [rows, n], contiguous.
            out_dtype: its type.
            n_threads: threads to use at most, the caller's included.

        Raises:
            KernelError: a size, type or address that cannot be used.
            MemoryError: scratch memory could not be allocated.
        """
        matrix = to_struct(weight)
        self.check(
            self._lib.fk_linear(
                ctypes.byref(matrix),
                *(x, x_dtype, x_stride, rows),
                *(out, out_dtype, weight.n),
                n_threads,
            )
        )

    def experts(
        self,
        first: int,
        down: int,
        gating: Gating,
        *,
        n_groups: int,
        group_sizes: int,
        pair_rows: int,
        pair_positions: int,
        pair_weights: int,
        x: int,
        x_dtype: KernelDtype,
        hidden_size: int,
        rows: int,
        is_reduced: bool,
        out: int,
        out_dtype: KernelDtype,
        n_threads: int = 1,
        layer: int | None = None,
    ) -> None:
        """Compute the pairs of a block's experts.

        Args:
            first: address of the gate-up (or up) projection of each group's expert, `n_groups`
                entries of `matrix_table`.
            down: address of the down projection of each group's expert, the same.
            gating: what stands between the projections.
            n_groups: number of experts that have pairs.
            group_sizes: address of the pairs per group, int64 [n_groups].
            pair_rows: address of the input row of each pair, int64 [P], group after group.
            pair_positions: address of the output row of each pair, int64 [P]; 0 if reduced, for
                its input row.
            pair_weights: address of the routing weight of each pair, float32 [P].
            x: address of the input, [rows, hidden_size], contiguous.
            x_dtype: its type.
            hidden_size: H.
            rows: number of input rows.
            is_reduced: whether to sum each row's pairs, [rows, H]; else [P, H].
            out: address of the output.
            out_dtype: its type.
            n_threads: threads to use at most, the caller's included.
            layer: index of the MoE layer of these experts, if their weights are mapped: where
                memory cannot hold all, sums in float32 then read them ahead (limited_memory.h).

        Raises:
            KernelError: a size, type or address that cannot be used.
            MemoryError: scratch memory could not be allocated.
        """
        pairs = _Pairs(n_groups, group_sizes, pair_rows, pair_positions or None, pair_weights, rows)
        if layer is not None and is_reduced and out_dtype is KernelDtype.FLOAT32:
            self.check(
                self._lib.fk_layer_experts(
                    *(layer, first, down, ctypes.byref(to_gating_struct(gating))),
                    *(ctypes.byref(pairs), x, x_dtype, hidden_size, rows, out, n_threads),
                )
            )
            return
        self.check(
            self._lib.fk_experts(
                *(first, down, ctypes.byref(to_gating_struct(gating)), ctypes.byref(pairs)),
                *(x, x_dtype, hidden_size, rows, is_reduced),
                *(out, out_dtype, hidden_size),
                n_threads,
            )
        )

    def function(
        self, name: str, argtypes: Sequence[Any], restype: Any = ctypes.c_int32
    ) -> Callable[..., Any]:
        """Return a function of the library, for other modules of this package."""
        function: Callable[..., Any] = getattr(self._lib, name)
        function.argtypes, function.restype = argtypes, restype  # type: ignore[attr-defined]
        return function

    def guard_mapping(
        self, address: int, size_bytes: int, *, file_offset: int = 0
    ) -> MappingGuard | None:
        """Guard the mapping of a file against its truncation; None if there are too many guards."""
        slot = self._lib.fk_guard_add(address, size_bytes, file_offset)
        return None if slot < 0 else MappingGuard(self._lib, slot)

    def check(self, status: int) -> None:
        """Raise the error of the thread's last call if `status` is one."""
        if not status:
            return
        message = self._lib.fk_last_error().decode()
        raise MemoryError(message) if status == OUT_OF_MEMORY else KernelError(message)


def matrix_table(items: Sequence[Matrix]) -> bytes:
    """Return the matrices as the library reads them, MATRIX_BYTES each.

    Entries may be gathered in any order into other memory; the weights themselves are not copied.
    """
    return bytes((MatrixStruct * len(items))(*map(to_struct, items)))


@lru_cache(maxsize=1)
def load() -> KernelLibrary:
    """Return the library; raises KernelsUnavailable with the reason."""
    setting = os.environ.get(DISABLE_ENV, "")
    if setting.lower() == "off":
        raise KernelsUnavailable(f"switched off by {DISABLE_ENV}=off")
    if setting.lower() not in ("", "on"):
        raise KernelsUnavailable(f"{DISABLE_ENV}: got {setting!r}, expected on or off")
    path = Path(__file__).parent / LIBRARY_NAME
    if not path.exists():
        raise KernelsUnavailable(
            f"{path} is not there: no C++ compiler was found when the package was installed"
        )
    library = KernelLibrary(path)
    if isa := os.environ.get(ISA_ENV, ""):
        try:
            library.use_isa(isa)
        except KernelError as error:
            raise KernelsUnavailable(f"{ISA_ENV}: {error}") from error
    return library


def describe_cpu_kernels() -> str:
    """Return what computes on this CPU, such as "native (avx2)", or "torch" with the reason."""
    try:
        return f"native ({load().isa})"
    except KernelsUnavailable as error:
        return f"torch ({error})"


def to_struct(m: Matrix) -> MatrixStruct:
    """Return the matrix as the library reads it."""
    return MatrixStruct(
        *(m.scheme, m.group, m.n, m.k, m.codes),
        *(m.scales or None, m.zeros or None, m.bias or None),
        *(m.scale_dtype, m.zero_dtype, m.bias_dtype, m.group_rows),
        *(m.codes_upper or None, m.scales_upper or None),
        *(m.factors or None, m.factors_upper or None),
    )


def to_gating_struct(g: Gating) -> GatingStruct:
    """Return the gating as the library reads it."""
    return GatingStruct(g.activation, g.is_gated, g.interleaved, g.alpha, g.limit)
