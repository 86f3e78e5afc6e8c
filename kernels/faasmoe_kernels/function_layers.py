"""Functions as the native loops of sandbox and router know them; see function_weights.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_kernels.library import Gating, GatingStruct, KernelDtype, to_gating_struct

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size, mtime_ns and ctime_ns of a file; changes whenever the file is written."""


class CallsError(ValueError):
    """The native side of calls rejected an argument, which the message names."""


class WeightsFileStruct(ctypes.Structure):
    """struct fk_weights_file."""

    _fields_ = (("path", ctypes.c_char_p), ("identity", ctypes.c_int64 * 5))


class FunctionLayerStruct(ctypes.Structure):
    """struct fk_function_layer."""

    _fields_ = (
        ("layer", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("n_experts", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("gating", GatingStruct),
        ("dtype", ctypes.c_int32),
        ("max_rows_per_expert", ctypes.c_int32),
        ("files", ctypes.POINTER(WeightsFileStruct)),
        ("n_files", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file that weights are mapped from.

    Attributes:
        path: its path.
        identity: device, inode, size, mtime_ns and ctime_ns of its verified content.
    """

    path: str
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class FunctionLayer:
    """One layer of a function.

    Attributes:
        layer: index of the MoE layer.
        hidden_size: elements per row.
        n_experts: entries of the two tables.
        first: address of a `matrix_table` with the first projection of each expert; zeros for
            experts outside the function. Copied, unlike the weights that it points to.
        down: the same of the down projections.
        gating: what stands between the projections.
        dtype: dtype of the rows.
        max_rows_per_expert: rows of one expert above which a frame is not ordinary; 0 for none.
        files: the files that the weights are mapped from; none if they never change.
    """

    layer: int
    hidden_size: int
    n_experts: int
    first: int
    down: int
    gating: Gating
    dtype: KernelDtype
    max_rows_per_expert: int = 0
    files: tuple[WeightsFile, ...] = ()


def to_layer_structs(layers: Sequence[FunctionLayer]) -> ctypes.Array[FunctionLayerStruct]:
    """Return the layers as the library reads them."""
    return (FunctionLayerStruct * len(layers))(
        *(
            FunctionLayerStruct(
                *(f.layer, f.hidden_size, f.n_experts, f.first, f.down),
                *(to_gating_struct(f.gating), f.dtype, f.max_rows_per_expert),
                _file_structs(f.files),
                len(f.files),
            )
            for f in layers
        )
    )


def _file_structs(files: Sequence[WeightsFile]) -> ctypes.Array[WeightsFileStruct]:
    return (WeightsFileStruct * len(files))(
        *(
            WeightsFileStruct(file.path.encode(), (ctypes.c_int64 * 5)(*file.identity))
            for file in files
        )
    )
