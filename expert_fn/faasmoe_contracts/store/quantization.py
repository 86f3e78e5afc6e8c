"""How a store holds quantised weights: schemes, codes and scales, as the manifest names them.

A quantised parameter `X` is two tensors or more: its codes `X`, [..., N, K] of a byte or
[..., N, K/2] with the even column in the low nibble, and beside it `X_scale` [..., N, G], where G
is K / group, or 1 with one scale per row. A weight is the value of its code times its scale. fp8
may have a scale for several rows, nvfp4 has factors of all scales (`X_global_scale`), int8 and
int4 may have zero points (`X_zero_point`). The layout is the same for every CPU, so all are read as
they lie in the mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields, StoreError
from faasmoe_contracts.store.tensors import DTYPE_SIZES

SCALE_SUFFIX = "_scale"
ZERO_SUFFIX = "_zero_point"
GLOBAL_SUFFIX = "_global_scale"
EXPERTS_QUANTIZATIONS = ("none", "int8", "int4", "mxfp4")
ROUTER_QUANTIZATIONS = ("none", "int8", "int4")
CODE_BITS: Mapping[str, int] = {
    "int8": 8,
    "int4": 4,
    "mxfp4": 4,
    "fp8": 8,
    "nvfp4": 4,
}
CODEBOOKS: Mapping[str, str] = {
    "int8": "linear",
    "int4": "linear",
    "mxfp4": "e2m1",
    "fp8": "e4m3",
    "nvfp4": "e2m1",
}
CODE_DTYPES: Mapping[str, str] = {
    "int8": "I8",
    "int4": "U8",
    "mxfp4": "U8",
    "fp8": "F8_E4M3",
    "nvfp4": "U8",
}
"""Dtype of each scheme's codes by its name in safetensors."""
SCALE_DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "e8m0": "U8",
    "e4m3": "F8_E4M3",
}
"""Types of scales with the dtype in safetensors that holds them; e8m0 is 2 ** (byte - 127)."""
_FLOAT_SCALES = ("bfloat16", "float16", "float32")
SCHEME_SCALES: Mapping[str, tuple[str, ...]] = {
    "int8": _FLOAT_SCALES,
    "int4": _FLOAT_SCALES,
    "mxfp4": ("e8m0",),
    "fp8": (*_FLOAT_SCALES, "e8m0"),
    "nvfp4": ("e4m3",),
}
"""Types that the scales of each scheme may have."""
GROUP_MULTIPLE = 32
"""Groups of columns are multiples of this, as in `faasmoe_kernels`."""
FIXED_GROUPS: Mapping[str, int] = {"mxfp4": GROUP_MULTIPLE, "nvfp4": 16}
"""The only group of these schemes."""
COMPONENT_NAMES: Mapping[str, str] = {
    "": "codes",
    SCALE_SUFFIX: "scales",
    ZERO_SUFFIX: "zero points",
    GLOBAL_SUFFIX: "factors",
}
"""What the tensors of a weight are, by their suffix."""
MAX_PARTS = 2
"""Parts of rows that have scales of their own: gate and up."""


@dataclass(frozen=True, slots=True)
class TensorQuantization:
    """How one weight, or each expert's weight of a stack, is quantised.

    Attributes:
        scheme: "int8" (code * scale), "int4" ((code - 8) * scale), "mxfp4" (E2M1 * scale), "fp8"
            (E4M3 * scale) or "nvfp4" (E2M1 * scale * factor).
        shape: N and K of the weight that the codes represent, K contiguous.
        group: columns per scale, a multiple of 32 that divides K, in fp8 perhaps but for a rest; 16
            in nvfp4; 0 for one scale per row.
        scale_dtype: a key of SCALE_DTYPES.
        group_rows: rows per scale, of fp8 only; the last ones of a part may be fewer.
        parts: equal parts of the rows, each with scale rows (fp8), or a factor (nvfp4), of its own.
        symmetric: whether there are no zero points, of int8 and int4 only: (code + 128 - zero)
            * scale, or (code - zero) * scale.
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
    group_rows: int = 1
    parts: int = 1
    symmetric: bool = True

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
        """Shape of the scales of one weight: [N, G], or fewer rows that share them."""
        rows, columns = self.shape
        n_rows = self.parts * -(-rows // self.parts // self.group_rows)
        return n_rows, -(-columns // self.group) if self.group else 1

    @property
    def components(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (safetensors name) and shape of each tensor of one weight, by its suffix."""
        components: dict[str, tuple[str, tuple[int, ...]]] = {
            "": (CODE_DTYPES[self.scheme], self.codes_shape),
            SCALE_SUFFIX: (SCALE_DTYPES[self.scale_dtype], self.scales_shape),
        }
        if not self.symmetric:
            components[ZERO_SUFFIX] = ("U8", self.scales_shape)
        if self.scheme == "nvfp4":
            components[GLOBAL_SUFFIX] = ("F32", (self.parts, 1))
        return components

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors of one weight."""
        sizes = (math.prod(shape) * DTYPE_SIZES[dtype] for dtype, shape in self.components.values())
        return sum(sizes)

    @classmethod
    def from_json(cls, value: object, *, path: str) -> TensorQuantization:
        """Parse the entry; raises StoreError naming the field, got and expected."""
        fields = JsonFields(value, path)
        scheme = fields.pop_choice("scheme", CODE_BITS)
        fields.pop_choice("codebook", (CODEBOOKS[scheme],))
        entry = cls(
            scheme=scheme,
            symmetric=fields.pop_boolean("symmetric"),
            shape=_pop_shape(fields),
            group=fields.pop_integer("group"),
            scale_dtype=fields.pop_choice("scale_dtype", SCHEME_SCALES[scheme]),
            group_rows=_pop_count(fields, "group_rows"),
            parts=_pop_count(fields, "parts"),
            transposed=fields.pop_boolean("transposed"),
            norm=fields.pop_number("norm"),
            relative_error=fields.pop_number("relative_error"),
        )
        fields.reject_unknown()
        entry._validate(fields)
        return entry

    def _validate(self, fields: JsonFields) -> None:
        rows, columns = self.shape
        if self.bits == 4 and columns % 2:
            raise fields.error("shape", list(self.shape), "an even number of columns")
        if not self.symmetric and self.scheme not in ("int8", "int4"):
            raise fields.error("symmetric", False, f"true for {self.scheme}")
        if not 1 <= self.parts <= MAX_PARTS or rows % self.parts:
            raise fields.error("parts", self.parts, f"1, or 2 of an even number of rows, of {rows}")
        if self.parts > 1 and self.scheme not in ("fp8", "nvfp4"):
            raise fields.error("parts", self.parts, f"1 for {self.scheme}")
        largest = rows // self.parts if self.scheme == "fp8" else 1
        if not 1 <= self.group_rows <= largest:
            raise fields.error("group_rows", self.group_rows, f"1 to {largest} for {self.scheme}")
        self._validate_group(fields, columns)

    def _validate_group(self, fields: JsonFields, columns: int) -> None:
        fixed = FIXED_GROUPS.get(self.scheme)
        if fixed is not None and self.group != fixed:
            raise fields.error("group", self.group, f"{fixed} for {self.scheme}")
        has_rest = bool(self.group and columns % self.group) and self.scheme != "fp8"
        if self.group % (fixed or GROUP_MULTIPLE) or has_rest:
            expected = f"0 or a multiple of {fixed or GROUP_MULTIPLE} that divides {columns}"
            raise fields.error("group", self.group, expected)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {
            "scheme": self.scheme,
            "codebook": CODEBOOKS[self.scheme],
            "symmetric": self.symmetric,
            "shape": list(self.shape),
            "group": self.group,
            **({"group_rows": self.group_rows} if self.group_rows != 1 else {}),
            **({"parts": self.parts} if self.parts != 1 else {}),
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
        """Check the codes, scales and so on of a file.

        Args:
            name: name of the codes in the file.
            tensors: dtype (safetensors name) and shape of the file's tensors.
            leading: dimensions before N, such as the number of experts.

        Raises:
            StoreError: one is missing or has another dtype or shape; names got and expected.
        """
        for suffix, (dtype, matrix) in self.components.items():
            got, shape = tensors.get(name + suffix), (*leading, *matrix)
            if got != (dtype, shape):
                text = "nothing" if got is None else f"{got[0]} {list(got[1])}"
                raise StoreError(
                    f"{name + suffix}: got {text}, expected {dtype} {list(shape)}: {self.scheme} "
                    f"{COMPONENT_NAMES[suffix]} of {list(self.shape)} weights"
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


def _pop_count(fields: JsonFields, name: str) -> int:
    """Take a positive integer, 1 if the field is not there."""
    return fields.pop_integer(name, minimum=1) if fields.has(name) else 1


def _pop_shape(fields: JsonFields) -> tuple[int, int]:
    shape = fields.pop_array("shape")
    is_valid = len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not is_valid:
        raise fields.error("shape", shape, "two positive integers")
    return shape[0], shape[1]
