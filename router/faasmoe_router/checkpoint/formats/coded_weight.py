"""Weights that a checkpoint holds as codes and scales, read as floats row by row.

A CodedWeight stands for a tensor of the checkpoint: the conversion to the model's parameters does
not know that it is made of several. Where the store has a scheme for its codes, `read_stored` gives
them as they are stored, beside the dequantised values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_expert.functions.dequantization import E8M0_BIAS
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors

E8M0_NAN = 255
"""Byte of a power-of-two scale that is not a number."""
E4M3_NAN = 0x7F
"""Bits of an E4M3 code that is not a number, but for its sign."""
FLOAT_SCALE_DTYPES = ("F32", "BF16", "F16")
E8M0_DTYPES = ("F8_E8M0", "U8")


class CodedWeight(ABC):
    """A weight of a checkpoint that is made of codes and scales.

    Args:
        tensors: the checkpoint's tensors.
        codes_name: name of the codes among them.
        shape: shape of the weight.
        stored: how the store holds the codes without loss; None if it cannot.

    Attributes:
        codes_name: see above.
        stored: see above.
        published_bytes: bytes of codes and scales in the checkpoint.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        codes_name: str,
        shape: tuple[int, ...],
        stored: TensorQuantization | None = None,
    ) -> None:
        self.codes_name = codes_name
        self.stored = stored
        self.published_bytes = 0
        self._tensors = tensors
        self._shape = shape

    def get_shape(self) -> list[int]:
        """Return the shape of the weight."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return the dtype that it is dequantised to, unless the model has another."""
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        """Return some rows (dimension 0), or all for `...`, dequantised to float32.

        Raises:
            SourceUnsupported: scales or weights are not finite, or a scale is zero.
        """
        weights = self.read_rows(*row_range(index, self._shape[0]))
        if not torch.isfinite(weights).all():
            raise self._tensors.error(self.codes_name, "weights that are not finite", "numbers")
        return weights

    @property
    @abstractmethod
    def format_name(self) -> str:
        """What codes these are, for messages, such as `fp8 128 x 128`."""

    @abstractmethod
    def read_rows(self, start: int, end: int) -> Tensor:
        """Return rows `start` to `end` of the weight in float32."""

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes, scales and so on of rows by suffix; only if `stored` is not None.

        Of a matrix with scales for several rows, all rows are read.
        """
        raise NotImplementedError

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor of the checkpoint whose bytes are those of a stored one; or None."""
        return None

    @abstractmethod
    def check_scales(self) -> None:
        """Read the scales alone; raises SourceUnsupported if one is not finite or zero."""


def row_range(index: Any, n_rows: int) -> tuple[int, int]:
    """Return the first and last row + 1 of an index: `...` or a slice without step."""
    if index is Ellipsis:
        return 0, n_rows
    start, end, step = index.indices(n_rows)
    if step != 1:
        raise IndexError(f"got step {step}, expected 1")
    return start, end


def scale_floats(tensors: CheckpointTensors, name: str, scales: Tensor) -> Tensor:
    """Return scales in float32, of the same shape.

    Args:
        tensors: the checkpoint's tensors.
        name: name of the scales among them.
        scales: any float dtype, or e8m0 as float8_e8m0fnu or uint8.

    Raises:
        SourceUnsupported: one is not finite or zero.
    """
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = e8m0_bytes(tensors, name, scales).int() - E8M0_BIAS
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    values = scales.float()
    check_scales(tensors, name, values)
    return values


def e8m0_bytes(tensors: CheckpointTensors, name: str, scales: Tensor) -> Tensor:
    """Return powers of two as their bytes, uint8; raises SourceUnsupported for NaN."""
    exponents = scales.view(torch.uint8)
    if bool((exponents == E8M0_NAN).any()):
        raise tensors.error(name, "a scale that is NaN (e8m0 byte 255)", "finite scales")
    return exponents


def check_e4m3(tensors: CheckpointTensors, name: str, codes: Tensor) -> None:
    """Raise SourceUnsupported if an E4M3 code is NaN; there is no infinite one."""
    n_wrong = int(((codes.view(torch.uint8) & E4M3_NAN) == E4M3_NAN).sum())
    if n_wrong:
        raise tensors.error(name, f"{n_wrong} codes of weights that are not finite", "numbers")


def check_scales(tensors: CheckpointTensors, name: str, scales: Tensor) -> None:
    """Raise SourceUnsupported if a scale is not finite or zero."""
    is_wrong = ~torch.isfinite(scales) | (scales == 0)
    if bool(is_wrong.any()):
        value = float(scales[is_wrong].flatten()[0])
        n_wrong = int(is_wrong.sum())
        raise tensors.error(
            name,
            f"{n_wrong} of {scales.numel()} scales that are NaN, infinite or zero, "
            f"the first {value}",
            "finite scales other than 0",
        )
