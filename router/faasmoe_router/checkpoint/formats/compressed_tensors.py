"""Checkpoints in compressed-tensors' formats, as llm-compressor writes them.

- pack-quantized: `weight_packed`, int32 [N, K * bits / 32], lowest bits first, with `weight_shape`.
- int-quantized: `weight`, int8 [N, K].
- float-quantized, mxfp8-quantized: `weight`, E4M3 [N, K].
- nvfp4- and mxfp4-pack-quantized: `weight_packed`, uint8 [N, K/2] of E2M1.

All have `weight_scale`; asymmetric integers have `weight_zero_point`, NVFP4 a `weight_global_scale`
that divides. What a tensor is follows from its name and dtype; the config's groups say which bits,
block and group sizes may occur. Scales of inputs are not used: activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_router.checkpoint.formats.block_scaled import (
    MX_BLOCK,
    BlockScaledWeight,
    ScaleGrid,
)
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import E8M0_DTYPES, FLOAT_SCALE_DTYPES
from faasmoe_router.checkpoint.formats.grouped_integers import (
    WORD_BITS,
    GroupedIntegers,
    IntegerCodes,
    check_shape,
    unpack_words,
)
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings
from faasmoe_router.errors import SourceUnsupported

_PACKED_SUFFIX, _WEIGHT_SUFFIX = ".weight_packed", ".weight"
_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
_PACKED_BITS = (2, 4, 8)
_NIBBLE_BITS = 4
_NIBBLES_PER_WORD = WORD_BITS // _NIBBLE_BITS
_NVFP4_BLOCK = (1, 16)


def compressed_tensors_weights(
    tensors: CheckpointTensors, settings: QuantizationSettings
) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint in a format of compressed-tensors.

    Raises:
        SourceUnsupported: a field of the settings, or codes or scales are not supported.
    """
    reader = _Reader(tensors, settings)
    return [coded for name in tensors if (coded := reader.read(name)) is not None]


class _Reader:
    """Finds the parts of a weight and how it is quantised."""

    def __init__(self, tensors: CheckpointTensors, settings: QuantizationSettings) -> None:
        self._tensors = tensors
        self._schemes = list(_weight_schemes(settings))
        for name in ("transform_config", "sparsity_config"):
            value = settings.fields.get(name) or {}
            if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise settings.error(name, "nothing: weights are neither transformed nor sparse")

    def read(self, name: str) -> CodedTensor | None:
        """Return the weight of a tensor of codes; None for other tensors."""
        tensors, dtype = self._tensors, self._tensors.dtype(name)
        if name.endswith(_PACKED_SUFFIX):
            module = name.removesuffix(_PACKED_SUFFIX)
            if dtype == "I32":
                return self._coded(module, self._packed_integers(module))
            tensors.require(name, beside=name, dtypes=("I32", "U8"))
            return self._coded(module, self._packed_floats(module))
        if name.endswith(_WEIGHT_SUFFIX) and len(tensors.shape(name)) == 2:
            module = name.removesuffix(_WEIGHT_SUFFIX)
            if dtype == "I8":
                return self._coded(module, self._plain_integers(module))
            if dtype == "F8_E4M3":
                return self._coded(module, self._plain_floats(module))
        return None

    def _coded(self, module: str, weight: GroupedIntegers | BlockScaledWeight) -> CodedTensor:
        parts = frozenset(f"{module}.{part}" for part in _PARTS)
        return CodedTensor(f"{module}{_WEIGHT_SUFFIX}", weight, parts)

    def _packed_integers(self, module: str) -> GroupedIntegers:
        tensors, packed = self._tensors, f"{module}{_PACKED_SUFFIX}"
        shape_name = f"{module}.weight_shape"
        tensors.require(shape_name, beside=packed, dtypes=("I64", "I32"))
        check_shape(tensors, shape_name, [2], "rows and columns")
        n_rows, n_columns = (int(n) for n in tensors[shape_name][...])
        if n_rows < 1 or n_columns < 1:
            raise tensors.error(shape_name, f"{n_rows} x {n_columns}", "two positive sizes")
        bits = self._packed_bits(packed, n_rows, n_columns)
        codes = self._integer_codes(module, packed, bits, (n_rows, n_columns))
        if not codes.is_symmetric:
            zeros = f"{module}.weight_zero_point"
            tensors.require(zeros, beside=packed, dtypes=("I32",))
            n_words = -(-n_rows * bits // WORD_BITS)
            check_shape(tensors, zeros, [n_words, codes.n_groups], "[words of rows, groups]")
        return PackedIntegers(tensors, module, packed, codes)

    def _packed_bits(self, packed: str, n_rows: int, n_columns: int) -> int:
        allowed = sorted({int(s["num_bits"]) for s in self._of_type("int")} & set(_PACKED_BITS))
        shapes = {bits: [n_rows, -(-n_columns * bits // WORD_BITS)] for bits in allowed}
        got = self._tensors.shape(packed)
        found = next((bits for bits, shape in shapes.items() if shape == got), None)
        if found is None:
            expected = " or ".join(f"{shape} ({bits} bits)" for bits, shape in shapes.items())
            bits = sorted({s["num_bits"] for s in self._of_type("int")})
            raise self._tensors.error(
                packed,
                f"shape {got} for {n_rows} x {n_columns} weights with num_bits {bits}",
                expected or "2, 4 or 8 bits",
            )
        return found

    def _plain_integers(self, module: str) -> GroupedIntegers:
        name = f"{module}{_WEIGHT_SUFFIX}"
        n_rows, n_columns = self._tensors.matrix_shape(name)
        codes = self._integer_codes(module, name, 8, (n_rows, n_columns))
        if not codes.is_symmetric:
            zeros = f"{module}.weight_zero_point"
            self._tensors.require(zeros, beside=name, dtypes=("I8",))
            scales_shape = self._tensors.shape(f"{module}.weight_scale")
            check_shape(self._tensors, zeros, scales_shape, "as the scales")
        return PlainIntegers(self._tensors, module, name, codes)

    def _integer_codes(
        self, module: str, name: str, bits: int, shape: tuple[int, int]
    ) -> IntegerCodes:
        scales = f"{module}.weight_scale"
        self._tensors.require(scales, beside=name, dtypes=FLOAT_SCALE_DTYPES)
        schemes = [s for s in self._of_type("int") if s["num_bits"] == bits]
        if not schemes:
            raise self._tensors.error(name, f"integers of {bits} bits", "a config group for them")
        has_order = f"{module}.weight_g_idx" in self._tensors
        group = self._group_size(scales, schemes, shape)
        is_symmetric = f"{module}.weight_zero_point" not in self._tensors
        if is_symmetric and all(scheme.get("symmetric") is False for scheme in schemes):
            is_symmetric = False
        return IntegerCodes(bits, shape, group, is_symmetric, has_order)

    def _group_size(
        self, scales: str, schemes: list[Mapping[str, Any]], shape: tuple[int, int]
    ) -> int:
        """Return the columns per scale that the shape of the scales and the config agree on."""
        n_rows, n_columns = shape
        got = self._tensors.shape(scales)
        expected: list[list[int]] = []
        for scheme in schemes:
            group = int(scheme.get("group_size") or -1)
            size = n_columns if group == -1 else group
            shapes = [[n_rows, -(-n_columns // size)]]
            if size == n_columns:
                shapes += [[n_rows], [1], []]
            if got in shapes:
                return size
            expected += shapes
        sizes = " or ".join(map(str, expected))
        raise self._tensors.error(scales, f"shape {got}", f"{sizes}: one scale per row and group")

    def _plain_floats(self, module: str) -> BlockScaledWeight:
        name, scales = f"{module}{_WEIGHT_SUFFIX}", f"{module}.weight_scale"
        self._tensors.require(scales, beside=name, dtypes=(*FLOAT_SCALE_DTYPES, *E8M0_DTYPES))
        if self._tensors.dtype(scales) in E8M0_DTYPES:
            return BlockScaledWeight(self._tensors, name, ScaleGrid(scales, MX_BLOCK))
        n_rows, n_columns = self._tensors.matrix_shape(name)
        blocks = {
            "tensor": (n_rows, n_columns),
            "channel": (1, n_columns),
        }
        found: list[BlockScaledWeight] = []
        errors: list[Exception] = []
        for scheme in self._of_type("float"):
            block = blocks.get(str(scheme.get("strategy")))
            if scheme.get("strategy") == "block":
                block = _block_structure(scheme)
            elif scheme.get("group_size"):
                block = (1, scheme["group_size"])
            if block is not None:
                try:
                    grid = ScaleGrid(scales, block)
                    found.append(BlockScaledWeight(self._tensors, name, grid))
                except SourceUnsupported as error:
                    errors.append(error)
        if not found:
            raise (
                errors[0]
                if errors
                else self._tensors.error(
                    name, "dtype F8_E4M3", "a config group of 8-bit floats for it"
                )
            )
        return found[0]

    def _packed_floats(self, module: str) -> BlockScaledWeight:
        packed, scales = f"{module}{_PACKED_SUFFIX}", f"{module}.weight_scale"
        global_scale = f"{module}.weight_global_scale"
        if global_scale not in self._tensors:
            self._tensors.require(scales, beside=packed, dtypes=E8M0_DTYPES)
            return BlockScaledWeight(self._tensors, packed, ScaleGrid(scales, MX_BLOCK))
        self._tensors.require(scales, beside=packed, dtypes=("F8_E4M3",))
        self._tensors.require(global_scale, beside=packed, dtypes=("F32",))
        grid = ScaleGrid(scales, _NVFP4_BLOCK, global_scale, is_divisor=True)
        return BlockScaledWeight(self._tensors, packed, grid)

    def _of_type(self, kind: str) -> list[Mapping[str, Any]]:
        return [scheme for scheme in self._schemes if scheme.get("type", "int") == kind]


class PackedIntegers(GroupedIntegers):
    """pack-quantized integers: codes and zero points are offset by half their range."""

    def __init__(
        self, tensors: CheckpointTensors, module: str, packed: str, codes: IntegerCodes
    ) -> None:
        super().__init__(tensors, packed, f"{module}.weight_scale", codes)
        self._zeros_name, self._order_name = f"{module}.weight_zero_point", f"{module}.weight_g_idx"

    def unsigned_codes(self, start: int, end: int) -> Tensor:
        """Return rows of the codes as integers from 0, int32 [R, K]."""
        words = self._tensors[self.codes_name][start:end]  # [R, W]
        return unpack_words(words, self._codes.bits)[:, : self._shape[1]]

    def row_scales(self, start: int, end: int) -> Tensor:
        """Return rows of the scales, [R, G] or [1, 1]."""
        return _matrix_rows(self._tensors, self._scales_name, start, end)

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor of the same bytes: words of whole rows of int4 codes, and scales."""
        is_same = self._codes.bits == _NIBBLE_BITS and self._shape[1] % _NIBBLES_PER_WORD == 0
        names = {"": self.codes_name} if is_same else {}
        return (names | {SCALE_SUFFIX: self._scales_name}).get(suffix)

    def row_zeros(self, start: int, end: int) -> Tensor | None:
        """Return rows of the zero points, int32 [R, G]; None if all are the middle."""
        if self._codes.is_symmetric:
            return None
        per_word = WORD_BITS // self._codes.bits
        first, last = start // per_word, -(-end // per_word)
        words = self._tensors[self._zeros_name][first:last]  # [W, G]
        zeros = unpack_words(words.T, self._codes.bits)  # [G, n]
        return zeros[:, start - first * per_word : end - first * per_word].T

    def group_index(self) -> Tensor:
        """Return the group of each column, [K]."""
        if not self._codes.has_order:
            return super().group_index()
        index = self._tensors[self._order_name][...].long()
        if index.numel() != self._shape[1] or bool(
            ((index < 0) | (index >= self._codes.n_groups)).any()
        ):
            raise self._tensors.error(
                self._order_name,
                f"{index.numel()} groups, some of them not there",
                f"{self._shape[1]} of 0 to {self._codes.n_groups - 1}",
            )
        return index


class PlainIntegers(GroupedIntegers):
    """int-quantized weights: int8 codes and zero points."""

    def __init__(
        self, tensors: CheckpointTensors, module: str, name: str, codes: IntegerCodes
    ) -> None:
        super().__init__(tensors, name, f"{module}.weight_scale", codes)
        self._zeros_name = f"{module}.weight_zero_point"

    def unsigned_codes(self, start: int, end: int) -> Tensor:
        """Return rows of the codes as integers from 0, int32 [R, K]."""
        return self._tensors[self.codes_name][start:end].int() + self._middle

    def row_scales(self, start: int, end: int) -> Tensor:
        """Return rows of the scales, [R, G] or [1, 1]."""
        return _matrix_rows(self._tensors, self._scales_name, start, end)

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor whose bytes are those of a stored one; None for zero points."""
        return {"": self.codes_name, SCALE_SUFFIX: self._scales_name}.get(suffix)

    def row_zeros(self, start: int, end: int) -> Tensor | None:
        """Return rows of the zero points, int32 [R, G]; None if all are the middle."""
        if self._codes.is_symmetric:
            return None
        return _matrix_rows(self._tensors, self._zeros_name, start, end).int() + self._middle


def _matrix_rows(tensors: CheckpointTensors, name: str, start: int, end: int) -> Tensor:
    """Return rows of a tensor [N, G] or [N]; a single number as [1, 1]."""
    shape = tensors.shape(name)
    if shape in ([], [1], [1, 1]):
        return tensors[name][...].reshape(1, 1)
    rows = tensors[name][start:end]
    return rows if rows.dim() == 2 else rows[:, None]


def _block_structure(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    value = scheme.get("block_structure")
    if isinstance(value, str):  # older configs: "128x128"
        value = [int(part) for part in value.split("x") if part.isdigit()]
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None


def _weight_schemes(settings: QuantizationSettings) -> Iterator[Mapping[str, Any]]:
    """Yield the `weights` of every config group; raises SourceUnsupported."""
    groups = settings.fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise settings.error("config_groups", "an object of groups")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if weights is None:
            continue
        is_valid = isinstance(weights, Mapping) and type(weights.get("num_bits")) is int
        size = weights.get("group_size") if is_valid else None
        if not is_valid or not (size is None or (type(size) is int and size != 0)):
            raise settings.error(
                "config_groups", f"num_bits and group_size in integers in {name}.weights"
            )
        yield weights
