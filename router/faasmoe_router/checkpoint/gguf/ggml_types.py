"""The types of GGML: how a tensor's values lie in a file, and what becomes of them in a store.

Rows are sequences of blocks. Blocks of Q8_0, Q4_0 and MXFP4 hold the codes and scales of a scheme
of the store, only in another order, so both are kept bit by bit. All other blocks are decoded by
the package gguf. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization

_BLOCK = 32
_E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How values are stored.

    Attributes:
        name: its name in GGML.
        number: its number in a file.
        block_elements: values of a block.
        block_bytes: bytes of a block.
    """

    name: str
    number: int
    block_elements: int
    block_bytes: int


_NAMES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "NVFP4"),
)
GGML_TYPES: Mapping[int, GgmlType] = {
    int(number): GgmlType(number.name, int(number), *gguf.GGML_QUANT_SIZES[number])
    for number in sorted(gguf.GGMLQuantizationType[name] for name in _NAMES)
}
"""The types that are read, by number."""

FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
KEPT_SCHEMES: Mapping[str, tuple[str, str]] = {
    "Q8_0": ("int8", "float16"),
    "Q4_0": ("int4", "float16"),
    "MXFP4": ("mxfp4", "e8m0"),
}
"""Types whose codes a store keeps, with the scheme and the type of the scales."""


class DamagedBlocks(Exception):
    """Blocks with values that no writer makes; the message says what was got and expected."""


def kept_quantization(
    kind: GgmlType, shape: tuple[int, int], *, transposed: bool
) -> TensorQuantization | None:
    """Return how a store keeps the codes of [N, K] weights of a type; None if it cannot."""
    if kind.name not in KEPT_SCHEMES:
        return None
    scheme, scale_dtype = KEPT_SCHEMES[kind.name]
    return TensorQuantization(scheme, shape, _BLOCK, scale_dtype, transposed)


def decode(data: bytes, kind: GgmlType, shape: tuple[int, ...]) -> Tensor:
    """Return the values of blocks: in float32, or in the dtype of a type that has floats.

    Args:
        data: the blocks.
        kind: their type.
        shape: [..., K] of the values.

    Raises:
        DamagedBlocks: a scale is not finite.
    """
    if kind.name in FLOAT_DTYPES:
        floats: Tensor = torch.frombuffer(bytearray(data), dtype=FLOAT_DTYPES[kind.name])
        return floats.view(shape)
    rows = np.frombuffer(data, np.uint8).reshape(-1, _row_bytes(kind, shape[-1]))
    with np.errstate(all="ignore"):  # the result is checked below
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(kind.number))
    decoded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(shape)
    if not torch.isfinite(decoded).all():
        raise DamagedBlocks("values that are not finite, expected finite scales")
    return decoded


def split_codes(data: bytes, kind: GgmlType, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of blocks of a type in KEPT_SCHEMES.

    Args:
        data: the blocks.
        kind: their type.
        shape: [..., N, K] of the values.

    Returns:
        int8 [..., N, K] or uint8 [..., N, K/2], and scales [..., N, K/32].

    Raises:
        DamagedBlocks: a scale is not finite.
    """
    n_groups = shape[-1] // kind.block_elements
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.block_bytes)  # [B, bytes]
    scale_bytes = 1 if kind.name == "MXFP4" else 2
    scales = np.ascontiguousarray(blocks[:, :scale_bytes])  # [B, bytes]
    codes = blocks[:, scale_bytes:]  # [B, 32] or [B, 16]
    scale_tensor = torch.from_numpy(scales)
    if kind.name != "MXFP4":
        scale_tensor = scale_tensor.view(torch.float16)
    _check_scales(scale_tensor)
    if kind.name == "Q8_0":
        code_tensor = torch.from_numpy(np.ascontiguousarray(codes).view(np.int8))
    else:
        code_tensor = torch.from_numpy(_pair_neighbours(codes))
    return code_tensor.view(*shape[:-1], -1), scale_tensor.view(*shape[:-1], n_groups)


def _check_scales(scales: Tensor) -> None:
    is_damaged = (
        bool((scales == _E8M0_NAN).any())
        if scales.dtype is torch.uint8
        else not torch.isfinite(scales).all()
    )
    if is_damaged:
        raise DamagedBlocks("a scale that is NaN or infinite, expected finite scales")


def _pair_neighbours(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reorder the nibbles of blocks [B, 16].

    In a file, byte j holds values j and j + 16; in a store, values 2 j and 2 j + 1.
    """
    halves = np.concatenate((codes & 15, codes >> 4), axis=1)  # [B, 32] in the order of values
    return halves[:, ::2] | (halves[:, 1::2] << 4)  # type: ignore[no-any-return]


def _row_bytes(kind: GgmlType, n_columns: int) -> int:
    return n_columns // kind.block_elements * kind.block_bytes
