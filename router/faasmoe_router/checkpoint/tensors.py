"""The checkpoint's tensors, opened but not read.

Bytes are read with `pread` and not mapped, so that what has been converted leaves memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from faasmoe_router.checkpoint.errors import PrepareError, SourceUnsupported

FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class LazyTensor(Protocol):
    """A tensor of a checkpoint that is read when it is indexed."""

    def get_shape(self) -> list[int]:
        """Return its shape."""

    def get_dtype(self) -> str:
        """Return its dtype as safetensors spells it."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read the indexed part."""


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[dict[str, LazyTensor]]:
    """Open every tensor of `files` by name; raises PrepareError that names a broken file."""
    with ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                tensors.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise PrepareError(f"{path}: got no readable safetensors file: {error}") from error
        yield tensors


def first_float_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype of the first floating tensor, as transformers guesses a missing dtype."""
    for tensor in tensors.values():
        if tensor.get_dtype() in FLOATS:
            return FLOATS[tensor.get_dtype()]
    raise SourceUnsupported("checkpoint: got no floating tensor, expected weights")
