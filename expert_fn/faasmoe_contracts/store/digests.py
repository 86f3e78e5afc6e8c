"""Digests of expert blocks: the content of `LayerEntry.digests` in the manifest.

A digest is the SHA-256 of the 64-bit sums of 4 KiB pages. It detects any flipped bit and any page
that is missing, zeroed or misplaced, and runs at the speed at which the pages are read. It does not
defend against an attacker, who could change the manifest as well.

Imports numpy, so `faasmoe_contracts.store` does not re-export it: the operator runs without numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from faasmoe_contracts.store.tensors import MappedLayer, TensorPiece

PAGE_WORDS = 512  # 8-byte words in a 4 KiB page
PAGE_BYTES = PAGE_WORDS * 8


def page_sum_digest(parts: Iterable[memoryview]) -> str:
    """Return the digest of a byte sequence given in parts, as 32 hexadecimal digits.

    Pages are counted from the beginning of each part, so the same split must be used every time,
    except that a part may be split further at whole pages.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_page_sums(part))
    return digest.hexdigest()[:32]


def _page_sums(part: memoryview) -> bytes:
    """Return the uint64 sum of each whole page, then the bytes of the incomplete last page."""
    view = part.cast("B")
    n_words = len(view) // 8
    words: NDArray[np.uint64] = np.frombuffer(view, "<u8", n_words)
    n_pages = n_words // PAGE_WORDS
    pages = words[: n_pages * PAGE_WORDS].reshape(n_pages, PAGE_WORDS)
    sums: NDArray[np.uint64] = np.add.reduce(pages, axis=1)  # [n_pages]
    tail = bytes(view[n_pages * PAGE_WORDS * 8 :])
    return sums.tobytes() + tail


def layer_digests(mapped: MappedLayer, n_experts: int) -> tuple[str, ...]:
    """Return the digest of each expert of a layer, then the digest of its shared parameters."""
    blocks = range(n_experts + 1)
    return tuple(page_sum_digest(block_buffers(mapped, n_experts, block)) for block in blocks)


def block_buffers(mapped: MappedLayer, n_experts: int, block: int) -> Iterator[memoryview]:
    """Yield the bytes of one block of a layer, in the order of `block_pieces`."""
    return (piece.buffer for piece in block_pieces(mapped, n_experts, block))


def block_pieces(mapped: MappedLayer, n_experts: int, block: int) -> Iterator[TensorPiece]:
    """Yield where one block of a layer lies, tensor by tensor in name order.

    Args:
        mapped: the mapped layer.
        n_experts: number of experts in the layer; stacked tensors have this first dimension.
        block: expert index, or `n_experts` for the shared parameters.
    """
    for _, view in sorted(mapped.tensors.items()):
        is_stacked = view.is_stacked(n_experts)
        if is_stacked and block < n_experts:
            yield from view.expert_pieces(block)
        elif not is_stacked and block == n_experts:
            yield from view.pieces
