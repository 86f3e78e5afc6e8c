"""Finds the parts of other stores that are equal to a store's own, byte by byte.

Digests tell which parts may be equal. They detect damage and do not defend against somebody who
makes a part of the same digest, so what is shared has been compared.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from faasmoe_contracts.store import StoreError
from faasmoe_router.checkpoint.sharing.parts import Part, Span

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
FIRST_CHUNK_BYTES = 64 << 10  # where tensors of unrelated models differ already
MAX_THREADS = 4
MIN_SHARE = 0.01  # of a file that parts must be equal to: a hard link keeps all of it on the disk

FileId = tuple[int, int]
"""Device and inode."""


class FileIds(dict[Path, FileId]):
    """Device and inode of files by their paths, each looked up once.

    Attributes:
        sizes: the files' sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[FileId, int] = {}

    def __missing__(self, path: Path) -> FileId:
        """Look a file up; raises StoreError if it is gone."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        self[path] = found = (status.st_dev, status.st_ino)
        self.sizes[found] = status.st_size
        return found


def find_equal(
    own: Sequence[Part],
    others: Mapping[Hashable, Sequence[Part]],
    on_bytes_compared: Callable[[int], None],
    ids: FileIds,
) -> dict[int, Part]:
    """Return the equal part of another store by the index of the own one, laid out as that.

    Of several equal ones that in the file of which most can be shared; none where the file is
    the own one already, or has little that can be shared.

    Args:
        own: the parts of the store.
        others: the parts of other stores by their key.
        on_bytes_compared: called with the bytes of each own part.
        ids: receives the identities of the files that were compared.
    """
    candidates = [list(_candidates(part, others, ids)) for part in own]
    shared_bytes: Counter[FileId] = Counter()
    for found in candidates:
        shared_bytes.update(_bytes_by_file(found, ids))

    def preference(part: Part) -> int:
        return -min(shared_bytes[ids[span.path]] for span in part.spans)

    with Comparison() as comparison, ThreadPoolExecutor(MAX_THREADS) as pool:

        def first_equal(index: int) -> Part | None:
            ordered = sorted(candidates[index], key=preference)
            return next((p for p in ordered if comparison.is_equal(own[index], p)), None)

        equal: dict[int, Part] = {}
        for index, part in enumerate(pool.map(first_equal, range(len(own)))):
            on_bytes_compared(own[index].size_bytes)
            if part is not None:
                equal[index] = part
    return _without_little_used(equal, ids)


def _candidates(
    part: Part, others: Mapping[Hashable, Sequence[Part]], ids: FileIds
) -> Iterator[Part]:
    """Yield the parts that may be equal to one, in files that are not its own."""
    for other in others.get(part.key, ()):
        found = other.laid_out_as(part)
        is_known_to_differ = part.digest and other.digest and part.digest != other.digest
        if not part.spans or found is None or is_known_to_differ:
            continue
        own = [ids[span.path] for span in part.spans]
        try:
            is_own = own == [ids[span.path] for span in found.spans]
        except StoreError as error:  # its store was removed meanwhile
            logger.warning("not shared: %s", error)
            continue
        if not is_own:
            yield found


def _bytes_by_file(parts: Sequence[Part], ids: FileIds) -> dict[FileId, int]:
    """Return the bytes in each file of parts that may stand for each other."""
    sizes: dict[FileId, int] = {}
    for part in parts:
        own: Counter[FileId] = Counter()
        for span in part.spans:
            own[ids[span.path]] += span.size_bytes
        sizes |= own
    return sizes


def _without_little_used(equal: dict[int, Part], ids: FileIds) -> dict[int, Part]:
    """Leave out parts in files of which little is shared."""
    used: Counter[FileId] = Counter()
    for part in equal.values():
        for span in part.spans:
            used[ids[span.path]] += span.size_bytes
    little = {file for file, size in used.items() if size < MIN_SHARE * ids.sizes[file]}
    return {
        index: part
        for index, part in equal.items()
        if not any(ids[span.path] in little for span in part.spans)
    }


class Comparison:
    """Compares parts by reading them; use it as a context manager.

    Files are read, not mapped, so that one that is truncated meanwhile is an error and no signal.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Comparison:
        """Return the comparison."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    def is_equal(self, part: Part, other: Part) -> bool:
        """Return whether two parts that are laid out alike have the same bytes.

        Parts of which one cannot be read are not equal.
        """
        pairs = zip(part.spans, other.spans, strict=True)
        try:
            return all(self._is_equal_span(a, b) for a, b in pairs)
        except StoreError as error:
            logger.warning("not shared: %s", error)
            return False

    def _is_equal_span(self, a: Span, b: Span) -> bool:
        start, chunk = 0, FIRST_CHUNK_BYTES
        while start < a.size_bytes:
            size_bytes = min(chunk, a.size_bytes - start)
            if self._read(a, start, size_bytes) != self._read(b, start, size_bytes):
                return False
            start, chunk = start + size_bytes, CHUNK_BYTES
        return True

    def _read(self, span: Span, start: int, size_bytes: int) -> bytes:
        try:
            data = os.pread(self._descriptor(span.path), size_bytes, span.offset + start)
        except OSError as error:
            raise StoreError(f"{span.path}: cannot be read: {error.strerror}") from error
        if len(data) != size_bytes:
            end = span.offset + start + size_bytes
            raise StoreError(
                f"{span.path}: got {end - size_bytes + len(data)} bytes, expected at least {end}: "
                "the file was truncated"
            )
        return data

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, descriptor)
            self._descriptors[path] = descriptor
        return descriptor
