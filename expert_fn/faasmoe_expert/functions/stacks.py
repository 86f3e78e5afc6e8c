"""One parameter of several experts: in one tensor, copied, scattered over files, or as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_expert.functions.dequantization import dequantize


@dataclass(frozen=True, slots=True)
class StackedBlock:
    """One stacked parameter, copied for the E experts of a block only.

    Attributes:
        tensor: values of the block's experts, [E, ...].
        position: index into `tensor` by global expert index.
    """

    tensor: Tensor
    position: Mapping[int, int]

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return the parameter of one global expert index, [...]."""
        return self.tensor[self.position[expert]]


@dataclass(frozen=True, slots=True)
class ScatteredStack:
    """One stacked parameter whose experts lie apart from each other in a checkpoint's files.

    Attributes:
        parts: the parts of each expert's parameter by global expert index: blocks of its rows
            (dimension 0) that follow each other, such as those of gate and up.
    """

    parts: Sequence[tuple[Tensor, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameter."""
        return self.parts[0][0].dtype

    def __len__(self) -> int:
        """Return the number of experts of the layer."""
        return len(self.parts)

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return the parameter of one expert: a view, or a copy if it lies in several parts."""
        parts = self.parts[expert]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class QuantizedStack:
    """One quantised parameter of all experts of a layer, mapped.

    Attributes:
        codes: a byte per weight [E, N, K], or per two [E, N, K/2].
        scales: [E, N, G], or of fewer rows.
        quantization: their scheme.
        zeros: zero points, uint8 [E, N, G]; None if the scheme is symmetric.
        factors: float32 [E, P, 1], see `dequantize`; None if the scheme has none.
    """

    codes: Tensor | ScatteredStack
    scales: Tensor | ScatteredStack
    quantization: TensorQuantization
    zeros: Tensor | ScatteredStack | None = None
    factors: Tensor | ScatteredStack | None = None

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return one expert's parameter in float32, dequantised anew by each call."""
        return dequantize(
            self.codes[expert],
            self.scales[expert],
            self.quantization,
            zeros=None if self.zeros is None else self.zeros[expert],
            factors=None if self.factors is None else self.factors[expert],
        )


@dataclass(frozen=True, slots=True)
class Float32Stack:
    """One parameter of all experts in any dtype, converted to float32 expert by expert."""

    stack: Tensor

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return one expert's parameter in float32."""
        return self.stack[expert].float()


Stack = Tensor | StackedBlock | QuantizedStack | ScatteredStack
"""One parameter of several experts, indexed by global expert index."""
