"""The tensors of GGUF files, read when they are indexed, in the layout of transformers' classes.

Files are read with `pread`, a part at a time: what has been converted leaves memory at once, and a
file that shrinks meanwhile is an error and not a signal. Where a store can keep codes as they are,
a tensor offers them too (`kept_codes`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_router.checkpoint.finite_tensors import is_finite
from faasmoe_router.checkpoint.gguf.ggml_types import (
    FLOAT_DTYPES,
    DamagedBlocks,
    GgmlType,
    decode,
    kept_quantization,
    split_codes,
)
from faasmoe_router.checkpoint.gguf.header import TensorInfo
from faasmoe_router.errors import PrepareError, SourceDamaged, WeightsNotFinite

_T = TypeVar("_T")


class OpenFile:
    """A file that is read at offsets; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> OpenFile:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PrepareError(f"{self.path}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size_bytes: int, name: str) -> bytes:
        """Return bytes of a tensor; raises SourceDamaged if the file ends before."""
        parts: list[bytes] = []
        end = offset + size_bytes
        while offset < end:
            try:
                part = os.pread(self._fd, end - offset, offset)
            except OSError as error:
                raise PrepareError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not part:
                raise SourceDamaged(
                    f"{self.path}: {name}: got the end of the file at {offset}, expected bytes up "
                    f"to {end}: the file was truncated while it was read"
                )
            parts.append(part)
            offset += len(part)
        return b"".join(parts)


class GgufTensor:
    """One tensor of a file.

    Args:
        file: the file.
        info: where it lies.
        allows_nonfinite: whether floats may be NaN or infinite; decoded weights never may.
    """

    def __init__(self, file: OpenFile, info: TensorInfo, *, allows_nonfinite: bool = False) -> None:
        self.info = info
        self._file = file
        self._allows_nonfinite = allows_nonfinite

    @property
    def type(self) -> GgmlType:
        """How its values are stored."""
        return self.info.type

    @property
    def format_name(self) -> str:
        """Its type, for messages."""
        return self.type.name

    @property
    def published_bytes(self) -> int:
        """Its bytes in the file."""
        return self.info.size_bytes

    @property
    def stored(self) -> TensorQuantization | None:
        """How a store keeps the published codes; None if it cannot, or if this is no matrix."""
        if len(self.info.shape) != 2:
            return None
        rows, columns = self.info.shape
        return kept_quantization(self.type, (rows, columns), transposed=False)

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """Return the dtype that it is decoded to."""
        return self.type.name if self.type.name in FLOAT_DTYPES else "F32"

    def __getitem__(self, index: Any) -> Tensor:
        """Read rows of dimension 0, all of them for an ellipsis; raises WeightsNotFinite."""
        if len(self.info.shape) == 1:  # its rows are parts of blocks
            whole = self._read(0, 1, (1, *self.info.shape), decode)
            rows = whole.view(self.info.shape)[index]
        else:
            first, end = row_range(index, self.info.shape[0])
            rows = self._read(first, end, self.info.shape, decode)
        if not self._allows_nonfinite and not is_finite(rows):
            raise WeightsNotFinite(
                f"{self._file.path}: {self.info.name}: got values that are NaN or infinite, "
                "expected finite weights; --allow-nonfinite accepts them"
            )
        return rows

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes and scales of rows of dimension 0 by suffix, as `split_codes`."""
        codes, scales = self._read(start, end, self.info.shape, split_codes)
        return {"": codes, SCALE_SUFFIX: scales}

    def source_of(self, suffix: str) -> str | None:
        """Return None: blocks hold codes and scales together."""
        return None

    def check_scales(self) -> None:
        """Do nothing: scales are checked as blocks are read."""

    def _read(
        self,
        first: int,
        end: int,
        shape: tuple[int, ...],
        convert: Callable[[bytes, GgmlType, tuple[int, ...]], _T],
    ) -> _T:
        row_bytes = self.info.size_bytes // shape[0]
        offset = self.info.offset + first * row_bytes
        data = self._file.read(offset, (end - first) * row_bytes, self.info.name)
        try:
            return convert(data, self.type, (end - first, *shape[1:]))
        except DamagedBlocks as error:
            raise SourceDamaged(f"{self._file.path}: {self.info.name}: got {error}") from error


class ReshapedTensor:
    """A tensor with a leading dimension of 1 that a file leaves out."""

    def __init__(self, source: GgufTensor) -> None:
        self._source = source

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return [1, *self._source.get_shape()]

    def get_dtype(self) -> str:
        """Return the dtype that it is decoded to."""
        return self._source.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        """Read all of it."""
        return self._source[...].unsqueeze(0)[index]


class ExpertStack:
    """A parameter of all experts of a layer: one tensor of a file, or gate and up joined.

    Args:
        parts: tensors [E, N] or [E, N, K] of the file; gate before up.
        interleaved: whether rows of gate and up alternate; else gate's come first.
        transposed: whether the parameter is [E, K, N].
    """

    def __init__(
        self, parts: Sequence[GgufTensor], *, interleaved: bool = False, transposed: bool = False
    ) -> None:
        self.parts = tuple(parts)
        self._interleaved = interleaved
        self._transposed = transposed

    @property
    def format_name(self) -> str:
        """The types of its parts, for messages."""
        return "/".join(dict.fromkeys(part.format_name for part in self.parts))

    @property
    def published_bytes(self) -> int:
        """Bytes of its parts in the file."""
        return sum(part.published_bytes for part in self.parts)

    @property
    def stored(self) -> TensorQuantization | None:
        """How a store keeps the published codes; None if it cannot."""
        first, *others = self.parts
        shape = self._joined_shape()
        if len(shape) != 3 or any(part.type != first.type for part in others):
            return None
        return kept_quantization(first.type, (shape[1], shape[2]), transposed=self._transposed)

    def get_shape(self) -> list[int]:
        """Return its shape."""
        experts, *matrix = self._joined_shape()
        return [experts, *(reversed(matrix) if self._transposed else matrix)]

    def get_dtype(self) -> str:
        """Return the dtype that it is decoded to."""
        names = {part.get_dtype() for part in self.parts}
        return names.pop() if len(names) == 1 else "F32"

    def __getitem__(self, index: Any) -> Tensor:
        """Read experts, all of them for an ellipsis."""
        first, end = row_range(index, self.get_shape()[0])
        dtype = FLOAT_DTYPES[self.get_dtype()]
        joined = self._join([part[first:end].to(dtype) for part in self.parts])
        return joined.transpose(-1, -2) if self._transposed else joined

    def read_stored(self, start: int, end: int) -> Mapping[str, Tensor]:
        """Return codes [e, N, K or K/2] and scales [e, N, K/32] of some experts by suffix."""
        parts = [part.read_stored(start, end) for part in self.parts]
        return {suffix: self._join([part[suffix] for part in parts]) for suffix in parts[0]}

    def source_of(self, suffix: str) -> str | None:
        """Return None: blocks hold codes and scales together."""
        return None

    def check_scales(self) -> None:
        """Do nothing: scales are checked as blocks are read."""

    def _joined_shape(self) -> list[int]:
        shape = self.parts[0].get_shape()
        return [shape[0], sum(part.get_shape()[1] for part in self.parts), *shape[2:]]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join along dimension 1."""
        if self._interleaved and len(parts) > 1:
            return torch.stack(tuple(parts), dim=2).flatten(1, 2)
        return torch.cat(tuple(parts), dim=1)


def row_range(index: Any, n_rows: int) -> tuple[int, int]:
    """Return the first row and the end of an index: an ellipsis, or a slice without a step."""
    if index is Ellipsis:
        return 0, n_rows
    first, end, step = index.indices(n_rows)
    if step != 1:
        raise ValueError(f"index: got {index}, expected a step of 1")
    return first, max(first, end)
