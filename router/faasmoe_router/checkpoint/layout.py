"""The store's tensor files, laid out before a byte is written: headers, offsets, sizes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

ALIGNMENT = 4096
ROUTER_SHARD_BYTES = 2 << 30
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be stored: its name in the model, its name in the file, its dtype and shape."""

    name: str
    local_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One safetensors file: its header, its size, and where each tensor begins."""

    name: str
    header: bytes
    size_bytes: int
    offsets: Mapping[str, int]
    tensors: tuple[TensorSpec, ...]


def lay_out(name: str, tensors: Iterable[TensorSpec]) -> FileLayout:
    """Lay out one file: widest dtype first, so that each tensor is aligned to its own dtype."""
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.local_name))
    entries: dict[str, dict[str, object]] = {}
    begins: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.size_bytes
        begins[tensor.name] = begin
        entries[tensor.local_name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = _header(entries)
    offsets = {tensor_name: len(header) + begin for tensor_name, begin in begins.items()}
    return FileLayout(name, header, len(header) + end, offsets, tuple(ordered))


def lay_out_router(
    tensors: Iterable[TensorSpec], *, shard_bytes: int = ROUTER_SHARD_BYTES
) -> list[FileLayout]:
    """Lay out the router's tensors in files of at most `shard_bytes`, in their order."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    names = (f"router/model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 100_000))
    return [lay_out(name, shard) for name, shard in zip(names, shards, strict=False)]


def _header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
