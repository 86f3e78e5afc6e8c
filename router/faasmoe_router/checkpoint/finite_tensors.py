"""Refuses weights that are not finite, while they are read to be converted.

One such weight of a router makes every text empty, one of an expert the texts of whoever meets it,
and quantising it spoils its whole group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from faasmoe_router.checkpoint.formats.coded_weight import E4M3_NAN, CodedWeight
from faasmoe_router.errors import WeightsNotFinite
from faasmoe_transformers.weight_conversion import FLOAT_DTYPES, LazyTensor

EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of an exponent, all of which are set in NaN and infinite values only."""
PIECE_VALUES = 1 << 17  # checked at once, so that temporaries stay in the cache


class FiniteTensor:
    """A tensor of a checkpoint, each part of which is checked when it is read.

    Args:
        tensor: the tensor.
        path: the file that it is in.
        name: its name there.
    """

    def __init__(self, tensor: LazyTensor, path: Path, name: str) -> None:
        self._tensor = tensor
        self._path = path
        self._name = name

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return self._tensor.get_shape()

    def get_dtype(self) -> str:
        """Return the name of its dtype in safetensors."""
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read the indexed part; raises WeightsNotFinite."""
        part = self._tensor[index]
        if not is_finite(part):
            n_bad = int((~part.isfinite()).sum())
            raise WeightsNotFinite(
                f"{self._path}: {self._name}: got {n_bad} values that are NaN or infinite, "
                "expected finite weights; --allow-nonfinite accepts them"
            )
        return part


def checked_tensors(
    tensors: Mapping[str, LazyTensor], paths: Mapping[str, Path]
) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors, with those that are not quantised checked when read.

    Args:
        tensors: the tensors.
        paths: the file of each.
    """
    return {
        name: tensor
        if isinstance(tensor, CodedWeight) or tensor.get_dtype() not in FLOAT_DTYPES
        else FiniteTensor(tensor, paths[name], name)
        for name, tensor in tensors.items()
    }


def is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite; codes and indices are."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype in EXPONENT_BITS:  # a sum of 16-bit values takes ten times as long
        bits, exponent = values.view(torch.int16).flatten(), EXPONENT_BITS[values.dtype]
        pieces = (bits[at : at + PIECE_VALUES] for at in range(0, bits.numel(), PIECE_VALUES))
        return all(int((piece & exponent).max()) != exponent for piece in pieces)
    if values.dtype is torch.float8_e4m3fn:
        return not bool(((values.view(torch.uint8) & E4M3_NAN) == E4M3_NAN).any())
    # A sum takes one pass without a temporary; it is finite unless a value is not, or it overflows.
    if values.sum(dtype=torch.float32).isfinite():
        return True
    return bool(values.isfinite().all())
