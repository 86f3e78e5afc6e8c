"""A checkpoint's tensors with dequantising ones in the place of codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

from faasmoe_router.checkpoint.formats.coded_weight import CodedWeight


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A coded weight and the tensors of the checkpoint that it replaces.

    Attributes:
        name: the name that the weight has in checkpoints that are not quantised.
        weight: the weight.
        parts: names that it takes the place of; some may be missing.
    """

    name: str
    weight: CodedWeight
    parts: frozenset[str]
