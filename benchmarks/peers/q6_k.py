"""llama.cpp's Q6_K blocks, which the package gguf can only read.

`llama-quantize` keeps the head of a Q4_0 file in this type. A block has 256 weights in groups of
16: six bits per weight, a scale of 8 bits per group and one of float16 for the block. As in
llama.cpp's reference (`quantize_row_q6_K_ref`), a group's scale is the one of 19 candidates with
the least squared error, weighted by the weights' squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK_WEIGHTS, GROUP_WEIGHTS = 256, 16
N_GROUPS = BLOCK_WEIGHTS // GROUP_WEIGHTS
LOWEST, HIGHEST = -32, 31
SMALLEST_GROUP = 1e-15  # groups below are zeros
BLOCKS_AT_ONCE = 4096  # bounds the memory of the candidates


def quantize_q6_k(weights: Floats) -> Bytes:
    """Return the blocks of a matrix, uint8 [N, K / 256 * 210].

    Args:
        weights: float32 [N, K]; K is a multiple of 256.
    """
    blocks = weights.reshape(-1, N_GROUPS, GROUP_WEIGHTS)  # [B, 16, 16]
    parts = [
        _quantize_blocks(blocks[start : start + BLOCKS_AT_ONCE])
        for start in range(0, len(blocks), BLOCKS_AT_ONCE)
    ]
    return np.concatenate(parts).reshape(len(weights), -1)


def _quantize_blocks(groups: Floats) -> Bytes:
    """Return blocks [B, 210] of groups [B, 16, 16]."""
    scales = _group_scales(groups)  # [B, 16]
    at_largest = np.abs(scales).argmax(-1)[:, None]  # [B, 1]
    largest = np.take_along_axis(scales, at_largest, -1)  # [B, 1]
    is_zero = np.abs(largest) < SMALLEST_GROUP  # [B, 1]
    inverse = np.float32(-128) / np.where(is_zero, 1, largest)  # [B, 1]
    block_scale = np.where(is_zero, 0, 1 / inverse).astype(np.float16)  # [B, 1]
    codes_of_scales = np.minimum(127, np.rint(inverse * scales))  # [B, 16]
    step = (block_scale.astype(np.float32) * codes_of_scales)[..., None]  # [B, 16, 1]
    codes = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step != 0))
    offset = np.clip(codes, LOWEST, HIGHEST) - LOWEST  # [B, 16, 16]
    offset = np.where(is_zero[..., None], 0, offset).astype(np.uint8)
    return np.concatenate(
        (
            _pack_codes(offset.reshape(-1, 2, 4, 32)),
            np.where(is_zero, 0, codes_of_scales).astype(np.int8).view(np.uint8),
            block_scale.view(np.uint8),
        ),
        axis=-1,
    )


def _group_scales(groups: Floats) -> Floats:
    """Return the best scale of each group, [B, 16], of groups [B, 16, 16]."""
    at_largest = np.abs(groups).argmax(-1)[..., None]  # [B, 16, 1]
    largest = np.take_along_axis(groups, at_largest, -1)  # [B, 16, 1]
    is_zero = np.abs(largest) < SMALLEST_GROUP
    best_scale = best_gain = np.zeros(groups.shape[:2], np.float32)  # [B, 16]
    for candidate in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(-LOWEST) + np.float32(0.1) * candidate) / np.where(
            is_zero, 1, largest
        )  # [B, 16, 1]
        codes = np.clip(np.rint(inverse * groups), LOWEST, HIGHEST)  # [B, 16, 16]
        weight = groups * groups
        product = (weight * groups * codes).sum(-1)  # [B, 16]
        square = (weight * codes * codes).sum(-1)  # [B, 16]
        scale = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        is_better = scale * product > best_gain
        best_scale = np.where(is_better, scale, best_scale)
        best_gain = np.where(is_better, scale * product, best_gain)
    return best_scale


def _pack_codes(codes: NDArray[Any]) -> Bytes:
    """Return the low four bits of all codes, then the high two: [B, 192] of [B, 2, 4, 32]."""
    low, high = codes & 0xF, codes >> 4  # [B, 2, 4, 32] each
    low_bytes = low[:, :, :2] | low[:, :, 2:] << 4  # [B, 2, 2, 32]
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]  # [4, 1]
    high_bytes = np.bitwise_or.reduce(high << shifts, axis=2)  # [B, 2, 32]
    return np.concatenate(
        (low_bytes.reshape(len(codes), -1), high_bytes.reshape(len(codes), -1)), axis=-1
    )
