"""How a store holds quantised weights: schemes, codes and scales, as the manifest names them.

A quantised parameter `X` is two tensors: its codes `X`, int8 [..., N, K] or uint8 [..., N, K/2]
with the even column in the low nibble, and `X_scale` [..., N, G] beside it, where G is K / group,
or 1 with one scale per row. A weight is the value of its code times its scale. The layout is the
same for every CPU, so both are read as they lie in the mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields, StoreError

SCALE_SUFFIX = "_scale"
EXPERTS_QUANTIZATIONS = ("none", "int8", "int4", "mxfp4")
ROUTER_QUANTIZATIONS = ("none", "int8", "int4")
CODE_BITS: Mapping[str, int] = {"int8": 8, "int4": 4, "mxfp4": 4}
CODEBOOKS: Mapping[str, str] = {"int8": "linear", "int4": "linear", "mxfp4": "e2m1"}
CODE_DTYPES: Mapping[str, str] = {"int8": "I8", "int4": "U8", "mxfp4": "U8"}
"""Dtype of each scheme's codes by its name in safetensors."""
SCALE_DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "e8m0": "U8",
}
"""Types of scales with the dtype in safetensors that holds them; e8m0 is 2 ** (byte - 127)."""
GROUP_MULTIPLE = 32
"""Groups of columns are multiples of this, as in `faasmoe_kernels`."""


@dataclass(frozen=True, slots=True)
class TensorQuantization:
    """How one weight, or each expert's weight of a stack, is quantised.

    Attributes:
        scheme: "int8" (code * scale), "int4" ((code - 8) * scale) or "mxfp4" (E2M1 * scale).
        shape: N and K of the weight that the codes represent, K contiguous.
        group: columns per scale, a multiple of 32 that divides K; 0 for one scale per row.
        scale_dtype: a key of SCALE_DTYPES.
        transposed: whether the codes are the transpose of the model's parameter.
        norm: Frobenius norm of the original weights.
        relative_error: Frobenius norm of the difference to the original weights over `norm`.
    """

    scheme: str
    shape: tuple[int, int]
    group: int
    scale_dtype: str
    transposed: bool = False
    norm: float = 0.0
    relative_error: float = 0.0

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return CODE_BITS[self.scheme]

    @property
    def codes_shape(self) -> tuple[int, int]:
        """Shape of the codes of one weight: [N, K] or [N, K/2]."""
        return self.shape[0], self.shape[1] * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of the scales of one weight: [N, G]."""
        return self.shape[0], self.shape[1] // self.group if self.group else 1

    @property
    def size_bytes(self) -> int:
        """Bytes of the codes and scales of one weight."""
        scale_bytes = 1 if self.scale_dtype == "e8m0" else 4 if self.scale_dtype == "float32" else 2
        return math.prod(self.codes_shape) + math.prod(self.scales_shape) * scale_bytes

    @classmethod
    def from_json(cls, value: object, *, path: str) -> TensorQuantization:
        """Parse the entry; raises StoreError naming the field, got and expected."""
        fields = JsonFields(value, path)
        scheme = fields.pop_choice("scheme", CODE_BITS)
        fields.pop_choice("codebook", (CODEBOOKS[scheme],))
        if fields.pop_boolean("symmetric") is not True:
            raise fields.error("symmetric", False, "true: zero points are not supported")
        entry = cls(
            scheme=scheme,
            shape=_pop_shape(fields),
            group=fields.pop_integer("group"),
            scale_dtype=fields.pop_choice(
                "scale_dtype",
                ("e8m0",) if scheme == "mxfp4" else ("bfloat16", "float16", "float32"),
            ),
            transposed=fields.pop_boolean("transposed"),
            norm=fields.pop_number("norm"),
            relative_error=fields.pop_number("relative_error"),
        )
        fields.reject_unknown()
        entry._validate(fields)
        return entry

    def _validate(self, fields: JsonFields) -> None:
        columns = self.shape[1]
        if self.bits == 4 and columns % 2:
            raise fields.error("shape", list(self.shape), "an even number of columns")
        if self.scheme == "mxfp4" and self.group != GROUP_MULTIPLE:
            raise fields.error("group", self.group, f"{GROUP_MULTIPLE} for mxfp4")
        if self.group % GROUP_MULTIPLE or (self.group and columns % self.group):
            expected = f"0 or a multiple of {GROUP_MULTIPLE} that divides {columns}"
            raise fields.error("group", self.group, expected)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {
            "scheme": self.scheme,
            "codebook": CODEBOOKS[self.scheme],
            "symmetric": True,
            "shape": list(self.shape),
            "group": self.group,
            "scale_dtype": self.scale_dtype,
            "transposed": self.transposed,
            "norm": self.norm,
            "relative_error": self.relative_error,
        }

    def check_tensors(
        self,
        name: str,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        leading: tuple[int, ...] = (),
    ) -> None:
        """Check the codes and scales of a file.

        Args:
            name: name of the codes in the file.
            tensors: dtype (safetensors name) and shape of the file's tensors.
            leading: dimensions before N, such as the number of experts.

        Raises:
            StoreError: one is missing or has another dtype or shape; names got and expected.
        """
        expected = {
            name: (CODE_DTYPES[self.scheme], (*leading, *self.codes_shape)),
            name + SCALE_SUFFIX: (SCALE_DTYPES[self.scale_dtype], (*leading, *self.scales_shape)),
        }
        for tensor, (dtype, shape) in expected.items():
            got = tensors.get(tensor)
            if got != (dtype, shape):
                text = "nothing" if got is None else f"{got[0]} {list(got[1])}"
                raise StoreError(
                    f"{tensor}: got {text}, expected {dtype} {list(shape)}: {self.scheme} "
                    f"{'codes' if tensor == name else 'scales'} of {list(self.shape)} weights"
                )


@dataclass(frozen=True, slots=True)
class QuantizationEntry:
    """What a store was asked to quantise.

    Attributes:
        experts: one of EXPERTS_QUANTIZATIONS.
        router: one of ROUTER_QUANTIZATIONS.
    """

    experts: str = "none"
    router: str = "none"

    def __bool__(self) -> bool:
        """Return whether anything is quantised."""
        return self != QuantizationEntry()

    def __str__(self) -> str:
        """Return both in words, for messages."""
        return f"experts {self.experts}, router {self.router}"

    @classmethod
    def from_json(cls, value: object, *, path: str = "quantization") -> QuantizationEntry:
        """Parse the entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        entry = cls(
            experts=fields.pop_choice("experts", EXPERTS_QUANTIZATIONS),
            router=fields.pop_choice("router", ROUTER_QUANTIZATIONS),
        )
        fields.reject_unknown()
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {"experts": self.experts, "router": self.router}


@dataclass(frozen=True, slots=True)
class RouterEntry:
    """The router's files.

    Attributes:
        quantized: how the weight of each quantised linear module is stored, by the module's name;
            its codes are `MODULE.weight`, its scales `MODULE.weight_scale`.
    """

    quantized: Mapping[str, TensorQuantization]

    @classmethod
    def from_json(cls, value: object) -> RouterEntry:
        """Parse the entry; raises StoreError naming the field."""
        fields = JsonFields(value, "router")
        entry = cls(quantizations_from_json(fields.pop_object("quantized"), "router.quantized"))
        fields.reject_unknown()
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {"quantized": {name: entry.to_json() for name, entry in self.quantized.items()}}

    @property
    def quantized_bytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(entry.size_bytes for entry in self.quantized.values())


def quantizations_from_json(value: Mapping[str, Any], path: str) -> dict[str, TensorQuantization]:
    """Parse entries by name; raises StoreError naming the field."""
    return {
        name: TensorQuantization.from_json(entry, path=f"{path}[{name!r}]")
        for name, entry in value.items()
    }


def relative_error(entries: Iterable[TensorQuantization]) -> float:
    """Return the relative error of several weights together."""
    entries = list(entries)
    norm = math.hypot(*(entry.norm for entry in entries))
    return (
        math.hypot(*(entry.norm * entry.relative_error for entry in entries)) / norm
        if norm
        else 0.0
    )


def _pop_shape(fields: JsonFields) -> tuple[int, int]:
    shape = fields.pop_array("shape")
    is_valid = len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not is_valid:
        raise fields.error("shape", shape, "two positive integers")
    return shape[0], shape[1]
