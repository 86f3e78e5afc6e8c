"""Weights of integers with a scale, and perhaps a zero point, per group of columns.

The layouts of GPTQ, AWQ and compressed-tensors differ in how codes are packed; what they stand for
does not: (code - zero) x scale. In groups that the store has, codes of 4 and 8 bits are kept, with
their zero points (`docs/store.md`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import (
    GROUP_MULTIPLE,
    SCALE_DTYPES,
    SCALE_SUFFIX,
    ZERO_SUFFIX,
)
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import CodedWeight, check_scales

_STORED_SCHEMES = {4: "int4", 8: "int8"}
_SCALE_TYPES = {dtype: name for name, dtype in SCALE_DTYPES.items() if name not in ("e8m0", "e4m3")}
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class IntegerCodes:
    """How the codes of a weight are quantised.

    Attributes:
        bits: bits of a code.
        shape: N and K of the weight.
        group: columns that share a scale; the last group may have fewer.
        is_symmetric: whether every zero point is the middle of the codes.
        has_order: whether columns are assigned to groups in another order than theirs.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    is_symmetric: bool = True
    has_order: bool = False

    @property
    def n_groups(self) -> int:
        """Scales of a row."""
        return -(-self.shape[1] // self.group)

    def stored(self, scale_dtype: str) -> TensorQuantization | None:
        """Return the store's entry for such codes; None if it has no scheme for them.

        Args:
            scale_dtype: dtype of the scales as safetensors names it.
        """
        columns = self.shape[1]
        group = 0 if self.group >= columns else self.group
        fits = group % GROUP_MULTIPLE == 0 and (not group or columns % group == 0)
        if not fits or self.has_order or columns % 2:
            return None
        if self.bits not in _STORED_SCHEMES or scale_dtype not in _SCALE_TYPES:
            return None
        scheme, scale_type = _STORED_SCHEMES[self.bits], _SCALE_TYPES[scale_dtype]
        return TensorQuantization(
            scheme, self.shape, group, scale_type, symmetric=self.is_symmetric
        )


class GroupedIntegers(CodedWeight):
    """A weight [N, K] of integer codes.

    Args:
        tensors: the checkpoint's tensors.
        codes_name: name of the codes among them.
        scales_name: name of the scales.
        codes: how they are quantised.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        codes_name: str,
        scales_name: str,
        codes: IntegerCodes,
    ) -> None:
        stored = codes.stored(tensors.dtype(scales_name))
        super().__init__(tensors, codes_name, codes.shape, stored)
        self._codes = codes
        self._scales_name = scales_name

    @abstractmethod
    def unsigned_codes(self, start: int, end: int) -> Tensor:
        """Return rows of the codes as integers from 0, int32 [R, K]."""

    @abstractmethod
    def row_scales(self, start: int, end: int) -> Tensor:
        """Return rows of the scales in their dtype, [R, G]."""

    @abstractmethod
    def row_zeros(self, start: int, end: int) -> Tensor | None:
        """Return rows of the zero points, int32 [R, G]; None if all are the middle."""

    @property
    def format_name(self) -> str:
        """What codes these are."""
        group, columns = self._codes.group, self._shape[1]
        size = "rows" if group >= columns else f"groups of {group}"
        zeros = "" if self._codes.is_symmetric else " with zero points"
        order = " in another order" if self._codes.has_order else ""
        return f"int{self._codes.bits} in {size}{zeros}{order}"

    def group_index(self) -> Tensor:
        """Return the group of each column, [K]."""
        return torch.arange(self._shape[1]) // self._codes.group

    def read_rows(self, start: int, end: int) -> Tensor:
        """Return rows `start` to `end` of the weight in float32."""
        index = self.group_index()  # [K]
        codes, zeros = self.unsigned_codes(start, end), self.row_zeros(start, end)
        zeros = torch.tensor([self._middle]) if zeros is None else zeros[:, index]
        scales = self._checked_scales(start, end).float()  # [R, G]
        return (codes - zeros).float().mul_(scales[:, index])

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes, int8 [R, K] or packed [R, K/2], scales [R, G], and zero points [R, G]."""
        index = torch.arange(self._shape[1]) // self._codes.group
        if not torch.equal(self.group_index(), index):
            raise self._tensors.error(
                self.codes_name, "columns in another order than their groups'", "no such order"
            )
        parts = {"": self._stored_codes(start, end), SCALE_SUFFIX: self._checked_scales(start, end)}
        zeros = self.row_zeros(start, end)
        if not self._codes.is_symmetric:
            zeros = torch.tensor(self._middle) if zeros is None else zeros
            parts[ZERO_SUFFIX] = self._stored_zeros(zeros).expand(end - start, self._codes.n_groups)
        elif zeros is not None and not bool((zeros == self._middle).all()):
            raise self._tensors.error(
                self.codes_name,
                f"a zero point of {int(zeros[zeros != self._middle][0])}",
                f"{self._middle} for all, as the quantisation is said to be symmetric",
            )
        return parts

    def check_scales(self) -> None:
        """Read the scales alone; raises SourceUnsupported if one is not finite or zero."""
        self._checked_scales(0, self._shape[0])

    def _stored_codes(self, start: int, end: int) -> Tensor:
        codes = self.unsigned_codes(start, end)
        if self._codes.bits == 8:
            return (codes - self._middle).to(torch.int8)
        nibbles = codes.to(torch.uint8)
        return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

    def _stored_zeros(self, zeros: Tensor) -> Tensor:
        """Return zero points, of codes counted from 0, as uint8."""
        if bool(((zeros < 0) | (zeros > 255)).any()):
            raise self._tensors.error(
                self.codes_name, f"zero points from {int(zeros.min())} on", "0 to 255"
            )
        return zeros.to(torch.uint8)

    @property
    def _middle(self) -> int:
        return 1 << (self._codes.bits - 1)

    def _checked_scales(self, start: int, end: int) -> Tensor:
        scales = self.row_scales(start, end)
        check_scales(self._tensors, self._scales_name, scales)
        return scales.expand(end - start, self._codes.n_groups)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes [..., W * 32 / bits] of the low 32 bits of integers, lowest bits first."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=words.dtype)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def check_shape(tensors: CheckpointTensors, name: str, expected: list[int], meaning: str) -> None:
    """Raise SourceUnsupported unless a tensor has a shape."""
    if tensors.shape(name) != expected:
        raise tensors.error(name, f"shape {tensors.shape(name)}", f"{expected}: {meaning}")
