"""Writing tensors to their places in the store's files; a file appears only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from faasmoe_expert.store import FileEntry, sha256_of_file
from faasmoe_router.checkpoint.conversion import Piece
from faasmoe_router.checkpoint.layout import FileLayout

PARTIAL_SUFFIX = ".partial"


class StoreFile:
    """One file under construction; `write` in any order, then it finishes by itself."""

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        self.layout = layout
        self._path = folder / layout.name
        self._partial = self._path.with_name(self._path.name + PARTIAL_SUFFIX)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._left = layout.size_bytes
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.truncate(self._fd, layout.size_bytes)
        self._write(memoryview(layout.header), 0)

    @property
    def whole(self) -> bool:
        """Tell whether every byte has been written."""
        return self._left == 0

    def write(self, piece: Piece) -> None:
        """Write rows of a tensor to their place."""
        tensor = piece.tensor.detach().contiguous()
        row_bytes = tensor[0].nbytes if tensor.dim() else 0
        offset = self.layout.offsets[piece.target] + piece.first_row * row_bytes
        self._write(tensor.reshape(-1).view(torch.uint8).numpy().data, offset)

    def finish(self) -> FileEntry:
        """Make the file durable and visible; return its size and digest."""
        os.fsync(self._fd)
        self.close()
        digest = sha256_of_file(self._partial)  # of what the disk gives back, from the page cache
        self._partial.rename(self._path)
        sync_folder(self._path.parent)
        return FileEntry(self.layout.size_bytes, digest)

    def close(self) -> None:
        """Release the file descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: memoryview, offset: int) -> None:
        self._left -= data.nbytes
        while data.nbytes:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count


class StoreWriter:
    """Sends pieces to the files that they belong to; pieces of other names are dropped."""

    def __init__(
        self,
        folder: Path,
        layouts: Iterable[FileLayout],
        *,
        finished: Callable[[str, FileEntry], None],
        written: Callable[[int], None],
    ) -> None:
        self._folder = folder
        self._layout_of = {name: layout for layout in layouts for name in layout.offsets}
        self._open: dict[str, StoreFile] = {}
        self._finished = finished
        self._written = written

    def write(self, piece: Piece) -> None:
        """Write a piece, and finish its file if it was the last one."""
        layout = self._layout_of.get(piece.target)
        if layout is None:
            return
        file = self._open.get(layout.name)
        if file is None:
            file = self._open[layout.name] = StoreFile(self._folder, layout)
            self._written(len(layout.header))
        file.write(piece)
        self._written(piece.tensor.nbytes)
        if file.whole:
            self._finished(layout.name, file.finish())
            del self._open[layout.name]

    def wants(self, name: str) -> bool:
        """Tell whether a tensor of this name is to be written."""
        return name in self._layout_of

    def close(self) -> None:
        """Release the files that are not whole; they stay as partial files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file by rename: it is there entirely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
