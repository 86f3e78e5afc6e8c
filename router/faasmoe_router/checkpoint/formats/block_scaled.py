"""Weights of 8- or 4-bit floats with a scale per block: fp8, mxfp8, mxfp4 and NVFP4.

fp8 codes are E4M3 with one scale per 128 x 128 weights, per row or per tensor. mxfp8 and mxfp4 have
a power of two (E8M0) per 32 columns, NVFP4 an E4M3 scale per 16 columns times one per tensor.
4-bit codes are packed by two along the columns, the even one in the low nibble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import (
    FIXED_GROUPS,
    GLOBAL_SUFFIX,
    GROUP_MULTIPLE,
    SCALE_DTYPES,
    SCALE_SUFFIX,
)
from faasmoe_expert.functions.dequantization import E2M1_VALUES
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import (
    E8M0_DTYPES,
    CodedWeight,
    check_e4m3,
    e8m0_bytes,
    scale_floats,
)

MX_BLOCK = (1, GROUP_MULTIPLE)
_SCALE_TYPES = {dtype: name for name, dtype in SCALE_DTYPES.items() if name not in ("e8m0", "e4m3")}


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Where the scales of a weight are and which weights share one.

    Attributes:
        name: name of the scales in the checkpoint.
        block: rows and columns that share a scale.
        global_name: name of a scale that applies to the whole weight; None without.
        is_divisor: whether weights are divided by the global scale.
    """

    name: str
    block: tuple[int, int]
    global_name: str | None = None
    is_divisor: bool = False


class BlockScaledWeight(CodedWeight):
    """A weight [..., N, K] of E4M3 or packed E2M1 codes with a scale per block.

    Args:
        tensors: the checkpoint's tensors.
        codes_name: E4M3 [..., N, K], or int8 or uint8 [..., N, K/2] of packed E2M1.
        grid: its scales.
    """

    def __init__(self, tensors: CheckpointTensors, codes_name: str, grid: ScaleGrid) -> None:
        shape = tensors.shape(codes_name)
        if len(shape) < 2 or 0 in shape:
            raise tensors.error(codes_name, f"shape {shape}", "rows and columns")
        self._is_packed = tensors.dtype(codes_name) in ("I8", "U8")
        if self._is_packed:
            shape[-1] *= 2
        self._grid = grid
        self._grid_shape = [
            *shape[:-2],
            math.ceil(shape[-2] / grid.block[0]),
            math.ceil(shape[-1] / grid.block[1]),
        ]
        self._check_grid(tensors)
        factor = grid.global_name
        if factor is not None and math.prod(tensors.shape(factor)) != 1:
            raise tensors.error(factor, f"shape {tensors.shape(factor)}", "a single number")
        stored = self._stored_scheme(tensors, (shape[-2], shape[-1]))
        super().__init__(tensors, codes_name, tuple(shape), stored)

    def _check_grid(self, tensors: CheckpointTensors) -> None:
        got = tensors.shape(self._grid.name)
        # One scale per tensor may have no dimension, one per row a single one.
        squeezed = [[n for n in shape if n != 1] for shape in (got, self._grid_shape)]
        if squeezed[0] != squeezed[1]:
            rows, columns = self._grid.block
            raise tensors.error(
                self._grid.name,
                f"shape {got}",
                f"{self._grid_shape}: one scale per {rows} x {columns} weights",
            )

    def _stored_scheme(
        self, tensors: CheckpointTensors, shape: tuple[int, int]
    ) -> TensorQuantization | None:
        rows, columns = self._grid.block
        dtype = tensors.dtype(self._grid.name)
        has_factor = self._grid.global_name is not None
        if not self._is_packed:
            scale_type = "e8m0" if dtype in E8M0_DTYPES else _SCALE_TYPES.get(dtype)
            group = 0 if columns >= shape[1] else columns
            if scale_type is None or has_factor or group % GROUP_MULTIPLE:
                return None
            return TensorQuantization(
                "fp8", shape, group, scale_type, group_rows=min(rows, shape[0])
            )
        if rows != 1 or shape[1] % columns:
            return None
        if columns == GROUP_MULTIPLE and dtype in E8M0_DTYPES and not has_factor:
            return TensorQuantization("mxfp4", shape, columns, "e8m0")
        if columns == FIXED_GROUPS["nvfp4"] and dtype == "F8_E4M3" and has_factor:
            return TensorQuantization("nvfp4", shape, columns, "e4m3")
        return None

    @property
    def format_name(self) -> str:
        """What codes these are."""
        if self._grid.global_name is not None:
            return "nvfp4"
        is_power_of_two = self._tensors.dtype(self._grid.name) in E8M0_DTYPES
        if self._grid.block == MX_BLOCK and is_power_of_two:
            return "mxfp4" if self._is_packed else "mxfp8"
        rows, columns = self._grid.block
        return f"fp8 {rows} x {columns}"

    def read_rows(self, start: int, end: int) -> Tensor:
        """Return rows `start` to `end` of the weight in float32."""
        codes = self._tensors[self.codes_name][start:end]
        values = unpack_e2m1(codes) if self._is_packed else codes.float()  # [R, ..., K]
        scales = self._row_scales(start, end)  # [R, ..., G]
        n_columns = self._grid.block[1]
        if values.shape[-1] % n_columns == 0:
            grouped = values.view(*scales.shape, n_columns)  # [R, ..., G, K / G]
            return grouped.mul_(scales[..., None]).flatten(-2)
        return values.mul_(scales.repeat_interleave(n_columns, -1)[..., : values.shape[-1]])

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes, scales and factors of rows, or of all if they share scales."""
        codes = self._tensors[self.codes_name][start:end]
        if self.stored is not None and self.stored.scheme == "fp8":
            check_e4m3(self._tensors, self.codes_name, codes)
        else:
            codes = codes.view(torch.uint8)
        grid = self._published_grid()
        scales = grid[start:end] if len(self._shape) > 2 or self._grid.block[0] == 1 else grid
        scale_floats(self._tensors, self._grid.name, scales)  # refuses those that are no scales
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = scales.view(torch.uint8)
        parts = {"": codes, SCALE_SUFFIX: scales}
        if self._grid.global_name is not None:
            parts[GLOBAL_SUFFIX] = self._factor().expand(*scales.shape[:-2], 1, 1)
        return parts

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor of the checkpoint whose bytes are those of a stored one; or None."""
        names = {"": self.codes_name, SCALE_SUFFIX: self._grid.name}
        if not self._grid.is_divisor and len(self._shape) == 2 and self._grid.global_name:
            names[GLOBAL_SUFFIX] = self._grid.global_name
        return names.get(suffix)

    def check_scales(self) -> None:
        """Read the scales alone; raises SourceUnsupported if one is not finite or zero."""
        scale_floats(self._tensors, self._grid.name, self._published_grid())
        if self._grid.global_name is not None:
            self._factor()

    def _published_grid(self) -> Tensor:
        """Return all scales in their dtype, [..., rows, G]."""
        return self._tensors[self._grid.name][...].reshape(self._grid_shape)

    def _factor(self) -> Tensor:
        """Return what the scales are multiplied by, a float32 number."""
        name = self._grid.global_name
        assert name is not None
        one = scale_floats(self._tensors, name, self._tensors[name][...].reshape(()))
        return 1 / one if self._grid.is_divisor else one

    def _row_scales(self, start: int, end: int) -> Tensor:
        """Return the scales of each row and group of columns, float32 [R, ..., G]."""
        n_rows = self._grid.block[0]
        if len(self._shape) > 2:  # rows of the slice are experts
            scales = self._read_grid(start, end)
            return scales.repeat_interleave(n_rows, -2)[..., : self._shape[-2], :]
        first = start // n_rows
        scales = self._read_grid(first, math.ceil(end / n_rows))
        index = torch.arange(start, end) // n_rows - first
        return scales[index]

    def _read_grid(self, start: int, end: int) -> Tensor:
        """Return rows of the scales, with the global one, in float32."""
        name = self._grid.name
        is_full = self._tensors.shape(name) == self._grid_shape
        tensor = self._tensors[name]
        scales = tensor[start:end] if is_full else tensor[...].reshape(self._grid_shape)[start:end]
        values = scale_floats(self._tensors, name, scales)
        if self._grid.global_name is None:
            return values
        one = self._tensors[self._grid.global_name][...].reshape(())
        factor = scale_floats(self._tensors, self._grid.global_name, one)
        return values / factor if self._grid.is_divisor else values * factor


class BlocksOf32(CodedWeight):
    """GPT-OSS's experts: mxfp4 in blocks of 32 columns, transposed in the model.

    Args:
        tensors: the checkpoint's tensors.
        codes_name: uint8 [E, N, K/32, 16], the even column in the low nibble.
        scales_name: e8m0 as uint8 [E, N, K/32].
    """

    def __init__(self, tensors: CheckpointTensors, codes_name: str, scales_name: str) -> None:
        blocks = tensors.shape(codes_name)
        if len(blocks) != 4 or blocks[-1] * 2 != GROUP_MULTIPLE:
            raise tensors.error(codes_name, f"shape {blocks}", "[experts, rows, columns / 32, 16]")
        if tensors.shape(scales_name) != blocks[:-1]:
            raise tensors.error(
                scales_name,
                f"shape {tensors.shape(scales_name)}",
                f"{blocks[:-1]}: one scale per 32 columns",
            )
        n_experts, n_rows, n_blocks, _ = blocks
        n_columns = n_blocks * GROUP_MULTIPLE
        stored = TensorQuantization(
            "mxfp4", (n_rows, n_columns), GROUP_MULTIPLE, "e8m0", transposed=True
        )
        super().__init__(tensors, codes_name, (n_experts, n_columns, n_rows), stored)
        self._scales_name = scales_name

    @property
    def format_name(self) -> str:
        """What codes these are."""
        return "mxfp4"

    def read_rows(self, start: int, end: int) -> Tensor:
        """Return experts in float32, [R, K, N]."""
        values = unpack_e2m1(self._tensors[self.codes_name][start:end])  # [R, N, K/32, 32]
        scales = self._tensors[self._scales_name][start:end]  # [R, N, K/32]
        factors = scale_floats(self._tensors, self._scales_name, scales)
        return values.mul_(factors[..., None]).flatten(-2).transpose(-1, -2)

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return experts' packed codes, uint8 [R, N, K/2], and scales, uint8 [R, N, K/32]."""
        scales = self._tensors[self._scales_name][start:end]
        return {
            "": self._tensors[self.codes_name][start:end].flatten(-2),
            SCALE_SUFFIX: e8m0_bytes(self._tensors, self._scales_name, scales),
        }

    def source_of(self, suffix: str) -> str | None:
        """Return the tensor of the checkpoint whose bytes are those of a stored one."""
        return {"": self.codes_name, SCALE_SUFFIX: self._scales_name}.get(suffix)

    def check_scales(self) -> None:
        """Read the scales alone; raises SourceUnsupported if one is NaN."""
        e8m0_bytes(self._tensors, self._scales_name, self._tensors[self._scales_name][...])


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Return the float32 values [..., 2n] of packed E2M1 codes [..., n], int8 or uint8."""
    one = torch.tensor(E2M1_VALUES, dtype=torch.float32)  # [16]
    byte = torch.arange(256)
    table = torch.stack((one[byte & 15], one[byte >> 4]), dim=-1)  # [256, 2]
    return F.embedding(packed.view(torch.uint8).int(), table).flatten(-2)
