"""The tensors of a checkpoint, with the file of each for error messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.weight_conversion import LazyTensor

_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


class CheckpointTensors:
    """The tensors of a checkpoint by name.

    Args:
        tensors: the tensors.
        files: the files that hold them.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], files: Sequence[Path]) -> None:
        self._tensors = tensors
        self._files = tuple(files)

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __getitem__(self, name: str) -> LazyTensor:
        """Return a tensor that is there."""
        return self._tensors[name]

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor."""
        return list(self._tensors[name].get_shape())

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix; raises SourceUnsupported for other shapes."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise self.error(name, f"shape {shape}", "two positive sizes")
        return shape[0], shape[1]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors names it."""
        return self._tensors[name].get_dtype()

    def size_bytes(self, name: str) -> int:
        """Return the bytes of a tensor; 0 if there is none of that name."""
        if name not in self._tensors:
            return 0
        return math.prod(self.shape(name)) * _DTYPE_BYTES.get(self.dtype(name), 1)

    def file_of(self, name: str) -> str:
        """Return the path of the file that holds a tensor; of the checkpoint if none does."""
        for path in self._files:
            try:
                with safe_open(path, framework="numpy") as file:
                    if name in file.keys():  # noqa: SIM118
                        return str(path)
            except (OSError, SafetensorError):
                continue
        return str(self._files[0].parent) if self._files else "checkpoint"

    def require(self, name: str, *, beside: str, dtypes: Sequence[str]) -> LazyTensor:
        """Return a tensor that another one needs.

        Args:
            name: its name.
            beside: the tensor that needs it.
            dtypes: the dtypes that it may have.

        Raises:
            SourceUnsupported: it is missing or has another dtype.
        """
        if name not in self._tensors:
            raise self.error(beside, f"no tensor {name} beside it", f"one of {_either(dtypes)}")
        if self.dtype(name) not in dtypes:
            raise self.error(name, f"dtype {self.dtype(name)}", _either(dtypes))
        return self._tensors[name]

    def error(self, name: str, got: object, expected: object) -> SourceUnsupported:
        """Return an error that names file, tensor, got and expected."""
        return SourceUnsupported(f"{self.file_of(name)}: {name}: got {got}, expected {expected}")


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
