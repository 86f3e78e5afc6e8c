"""Zeroed CPU tensors whose pages take neither time nor memory until they are used.

`torch.zeros` writes every byte: half a second for the KV cache of a small model, whose memory would
be released again right after. Pages that the operating system maps are zeros already.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MIN_BYTES = 1 << 20  # as malloc, which maps large blocks only


class UntouchedZeros(TorchFunctionMode):
    """Context in which this thread's `torch.zeros` maps large one-dimensional byte tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or replace it."""
        options = dict(kwargs or {})
        if func is torch.zeros and _is_large_byte_tensor(*args, **options):
            try:
                return _map_zeros(args[0], options["dtype"])
            except OSError:  # no room for the mapping: torch raises the error that callers expect
                pass
        return func(*args, **options)


def _is_large_byte_tensor(*size: Any, **options: Any) -> bool:
    device = torch.device(options.pop("device", None) or "cpu")
    return (
        options in ({"dtype": torch.uint8}, {"dtype": torch.int8})
        and device.type == "cpu"
        and len(size) == 1
        and isinstance(size[0], int)
        and size[0] >= MIN_BYTES
    )


def _map_zeros(n_bytes: int, dtype: torch.dtype) -> Tensor:
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)  # [n_bytes], holds a reference to `pages`
