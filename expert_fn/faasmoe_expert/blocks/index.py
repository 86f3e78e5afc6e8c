"""Where the blocks of a store lie, by their digests. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_contracts.store.digests import block_pieces


@dataclass(frozen=True, slots=True)
class FileRange:
    """Consecutive bytes of a file.

    Attributes:
        path: the file.
        offset: offset of the first byte.
        size_bytes: number of bytes.
    """

    path: Path
    offset: int
    size_bytes: int


class BlockIndex:
    """The blocks and files of one store.

    Args:
        store: an opened store.

    Raises:
        StoreError: a file of a layer does not match the manifest.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._blocks: Mapping[str, tuple[FileRange, ...]] = dict(_blocks(store))

    def block(self, digest: str) -> tuple[FileRange, ...] | None:
        """Return the bytes of a block, in the order of its digest; None if there is none."""
        return self._blocks.get(digest)

    def file(self, name: str) -> FileRange | None:
        """Return a file of the store by its name in the manifest, or the manifest itself."""
        path = self.store.path / name
        if name == MANIFEST_NAME:
            return FileRange(path, 0, path.stat().st_size)
        entry = self.store.manifest.files.get(name)
        return None if entry is None else FileRange(path, 0, entry.size_bytes)


def _blocks(store: Store) -> Iterator[tuple[str, tuple[FileRange, ...]]]:
    """Yield the digest and the bytes of each expert, and of each layer's shared parameters."""
    for layer in store.manifest.layers:
        mapped = store.map_layer(layer.index)
        for block, digest in enumerate(layer.digests):
            yield (
                digest,
                tuple(
                    FileRange(mapped.files[piece.file].path, piece.offset, piece.buffer.nbytes)
                    for piece in block_pieces(mapped, layer.num_experts, block)
                ),
            )
