"""Checkpoints quantised with GPTQ and AWQ: integers packed into 32-bit words.

GPTQ packs along the columns K, lowest bits first: `qweight` [K * bits / 32, N]. AWQ packs along the
rows N, in the order 0 2 4 6 1 3 5 7: `qweight` [K, N / 8]. Both have `scales` [G, N] and packed
`qzeros` [G, N * bits / 32]. GPTQ's first checkpoint format holds zero points less one. GPTQ may
assign columns to groups in another order (`g_idx`, `desc_act`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import FLOAT_SCALE_DTYPES
from faasmoe_router.checkpoint.formats.grouped_integers import (
    WORD_BITS,
    GroupedIntegers,
    IntegerCodes,
    check_shape,
    unpack_words,
)
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings

_SUFFIX = ".qweight"
_AWQ_BITS = 4
_AWQ_PER_WORD = WORD_BITS // _AWQ_BITS
_AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in an AWQ word of each of its 8 columns."""
_GPTQ_BITS = (2, 4, 8)


def gptq_weights(tensors: CheckpointTensors, settings: QuantizationSettings) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint quantised with GPTQ.

    Raises:
        SourceUnsupported: a field of the settings, or codes or scales are not supported.
    """
    version = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    reader = _GptqReader(tensors, settings, zero_offset=1 if version == "gptq" else 0)
    return [reader.read(name) for name in tensors if name.endswith(_SUFFIX)]


def awq_weights(tensors: CheckpointTensors, settings: QuantizationSettings) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint quantised with AWQ.

    Raises:
        SourceUnsupported: a field of the settings, or codes or scales are not supported.
    """
    settings.choice("version", ("gemm",), default="gemm")
    name = "bits" if "bits" in settings.fields else "w_bit"
    if settings.integer(name, default=_AWQ_BITS) != _AWQ_BITS:
        raise settings.error(name, _AWQ_BITS)
    return [_awq_tensor(tensors, name, settings) for name in tensors if name.endswith(_SUFFIX)]


class _GptqReader:
    """Finds the parts of a weight in GPTQ's layout."""

    def __init__(
        self, tensors: CheckpointTensors, settings: QuantizationSettings, *, zero_offset: int
    ) -> None:
        self._tensors = tensors
        self._settings = settings
        self._zero_offset = zero_offset
        self._is_symmetric = settings.flag("sym", default=True)
        self._has_order = settings.flag("desc_act", default=False)
        self._bits = settings.integer("bits")
        # Rules for single layers: bits and group are then read off the tensors' shapes.
        self._is_dynamic = bool(settings.fields.get("dynamic"))

    def read(self, name: str) -> CodedTensor:
        """Return the weight of a `qweight`."""
        module = name.removesuffix(_SUFFIX)
        qzeros, scales, order = f"{module}.qzeros", f"{module}.scales", f"{module}.g_idx"
        self._tensors.require(name, beside=name, dtypes=("I32",))
        self._tensors.require(qzeros, beside=name, dtypes=("I32",))
        self._tensors.require(scales, beside=name, dtypes=FLOAT_SCALE_DTYPES)
        codes = self._codes(name, qzeros, scales)
        check_shape(self._tensors, scales, [codes.n_groups, codes.shape[0]], "[groups, rows]")
        n_words = -(-codes.shape[0] * codes.bits // WORD_BITS)
        check_shape(self._tensors, qzeros, [codes.n_groups, n_words], "[groups, words of rows]")
        if order in self._tensors:
            check_shape(self._tensors, order, [codes.shape[1]], "the group of each column")
        weight = GptqWeight(self._tensors, module, codes, zero_offset=self._zero_offset)
        return CodedTensor(f"{module}.weight", weight, frozenset({name, qzeros, scales, order}))

    def _codes(self, name: str, qzeros: str, scales: str) -> IntegerCodes:
        n_words, n_rows = self._tensors.matrix_shape(name)
        bits = self._bits
        if self._is_dynamic:
            bits = self._tensors.matrix_shape(qzeros)[1] * WORD_BITS // n_rows
        if bits not in _GPTQ_BITS:
            raise self._tensors.error(name, f"{bits} bits", "2, 4 or 8")
        n_columns = n_words * WORD_BITS // bits
        group = self._settings.integer("group_size", default=-1)
        if self._is_dynamic:
            group = n_columns // self._tensors.matrix_shape(scales)[0]
        if group == -1:
            group = n_columns
        if group <= 0:
            raise self._settings.error("group_size", "a positive integer or -1")
        shape = (n_rows, n_columns)
        return IntegerCodes(bits, shape, group, self._is_symmetric, self._has_order)


class GptqWeight(GroupedIntegers):
    """A weight in GPTQ's layout.

    Args:
        tensors: the checkpoint's tensors.
        module: name of its linear layer.
        codes: how it is quantised.
        zero_offset: what the zero points lack, 1 in the first checkpoint format.
    """

    def __init__(
        self, tensors: CheckpointTensors, module: str, codes: IntegerCodes, *, zero_offset: int
    ) -> None:
        super().__init__(tensors, f"{module}{_SUFFIX}", f"{module}.scales", codes)
        self._zeros_name, self._order_name = f"{module}.qzeros", f"{module}.g_idx"
        self._zero_offset = zero_offset

    def unsigned_codes(self, start: int, end: int) -> Tensor:
        """Return rows of the codes as integers from 0, int32 [R, K]."""
        words = self._tensors[self.codes_name][:, start:end]  # [K * bits / 32, R]
        return unpack_words(words.T, self._codes.bits)

    def row_scales(self, start: int, end: int) -> Tensor:
        """Return rows of the scales, [R, G]."""
        return self._tensors[self._scales_name][:, start:end].T

    def row_zeros(self, start: int, end: int) -> Tensor:
        """Return rows of the zero points, int32 [R, G]."""
        bits = self._codes.bits
        per_word = WORD_BITS // bits
        first, last = start // per_word, -(-end // per_word)
        words = self._tensors[self._zeros_name][:, first:last]
        # Of whole words, as GPTQModel subtracts it: a zero of 0 borrows from its neighbour.
        ones = sum(self._zero_offset << shift for shift in range(0, WORD_BITS, bits))
        zeros = unpack_words(words.long() + ones, bits)  # [G, n]
        return zeros[:, start - first * per_word : end - first * per_word].T

    def group_index(self) -> Tensor:
        """Return the group of each column, [K]."""
        if self._order_name not in self._tensors:
            return super().group_index()
        index = self._tensors[self._order_name][...].long()
        n_groups = self._codes.n_groups
        if bool(((index < 0) | (index >= n_groups)).any()):
            raise self._tensors.error(
                self._order_name, "a group that is not there", f"0 to {n_groups - 1}"
            )
        return index


class AwqWeight(GroupedIntegers):
    """A weight in AWQ's layout.

    Args:
        tensors: the checkpoint's tensors.
        module: name of its linear layer.
        codes: how it is quantised.
    """

    def __init__(self, tensors: CheckpointTensors, module: str, codes: IntegerCodes) -> None:
        super().__init__(tensors, f"{module}{_SUFFIX}", f"{module}.scales", codes)
        self._zeros_name = f"{module}.qzeros"

    def unsigned_codes(self, start: int, end: int) -> Tensor:
        """Return rows of the codes as integers from 0, int32 [R, K]."""
        return self._unpacked_rows(self.codes_name, start, end)

    def row_scales(self, start: int, end: int) -> Tensor:
        """Return rows of the scales, [R, G]."""
        return self._tensors[self._scales_name][:, start:end].T

    def row_zeros(self, start: int, end: int) -> Tensor:
        """Return rows of the zero points, int32 [R, G]."""
        return self._unpacked_rows(self._zeros_name, start, end)

    def _unpacked_rows(self, name: str, start: int, end: int) -> Tensor:
        first, last = start // _AWQ_PER_WORD, -(-end // _AWQ_PER_WORD)
        words = self._tensors[name][:, first:last]  # [K or G, W]
        codes = unpack_words(words, _AWQ_BITS).view(len(words), -1, _AWQ_PER_WORD)  # [K, W, 8]
        columns = codes[..., torch.tensor(_AWQ_POSITIONS)].flatten(-2)  # [K, W * 8]
        rows: Tensor = columns[:, start - first * _AWQ_PER_WORD : end - first * _AWQ_PER_WORD]
        return rows.T


def _awq_tensor(
    tensors: CheckpointTensors, name: str, settings: QuantizationSettings
) -> CodedTensor:
    module = name.removesuffix(_SUFFIX)
    qzeros, scales = f"{module}.qzeros", f"{module}.scales"
    tensors.require(name, beside=name, dtypes=("I32",))
    tensors.require(qzeros, beside=name, dtypes=("I32",))
    tensors.require(scales, beside=name, dtypes=FLOAT_SCALE_DTYPES)
    n_columns, n_words = tensors.matrix_shape(name)
    size_name = "group_size" if "group_size" in settings.fields else "q_group_size"
    group = settings.integer(size_name, default=128)
    group = n_columns if group == -1 else group
    if group <= 0:
        raise settings.error(size_name, "a positive integer or -1")
    n_rows = n_words * _AWQ_PER_WORD
    codes = IntegerCodes(_AWQ_BITS, (n_rows, n_columns), group, is_symmetric=False)
    check_shape(tensors, scales, [codes.n_groups, n_rows], "[groups, rows]")
    check_shape(tensors, qzeros, [codes.n_groups, n_words], "[groups, words of rows]")
    weight = AwqWeight(tensors, module, codes)
    return CodedTensor(f"{module}.weight", weight, frozenset({name, qzeros, scales}))
