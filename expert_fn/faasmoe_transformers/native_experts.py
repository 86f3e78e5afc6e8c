"""The way back from a running program to Python: routed experts over the general path."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NativeExperts:
    """Computes routed experts when the program calls back.

    An error is kept until the program has returned, and raised then.

    Args:
        compute: returns the weighted sum of each row's experts, [T, H], of a layer index, the rows
            [T, H], their experts [T, k] and the experts' weights [T, k].
    """

    def __init__(self, compute: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
        self._compute = compute
        self._error: BaseException | None = None

    def __call__(
        self,
        _context: int | None,
        layer: int,
        rows: int,
        hidden_size: int,
        top_k: int,
        hidden: int,
        index: int,
        weight: int,
        out: int,
    ) -> int:
        """Write the weighted sum of each row's experts, [rows, hidden_size]; see ComputeExperts."""
        try:
            total = self._compute(
                layer,
                _view(hidden, ctypes.c_float, torch.float32, rows, hidden_size),
                _view(index, ctypes.c_int64, torch.int64, rows, top_k),
                _view(weight, ctypes.c_float, torch.float32, rows, top_k),
            )
            _view(out, ctypes.c_float, torch.float32, rows, hidden_size).copy_(total)
        except BaseException as error:  # it must not cross the native frames
            self._error = error
            return -1
        return 0

    def raise_error(self) -> None:
        """Raise the error of the last call, if it failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _view(address: int, ctype: Any, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    memory = (ctype * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
