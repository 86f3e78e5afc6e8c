"""A folder with the blocks of functions, fetched from block servers where the store is not.

Each function has a folder of its own that looks like the store: the manifest, and files of the
store's sizes that have bytes only where the function's blocks lie and are holes elsewhere, so that
they are mapped and verified as a store's are. Every block is verified against the manifest while it
is written. Folders of detached functions stay until their space is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, LayerEntry, Manifest, StoreError
from faasmoe_contracts.store.digests import PAGE_BYTES, block_pieces, page_sum_digest
from faasmoe_contracts.store.tensors import map_tensors
from faasmoe_expert.blocks.client import PeerClient, PeerError
from faasmoe_expert.errors import OutOfMemory, StoreUnavailable

logger = logging.getLogger(__name__)

PARALLEL_BLOCKS = 4
CHUNK_BYTES = 256 * PAGE_BYTES
"""Bytes that are received, summed and written at once: they stay in the core's cache."""
HEADER_BYTES = 64 << 10
"""First guess of the size of a safetensors header."""
MODEL_PREFIX = "model/"
UNFINISHED_SUFFIX = "~"
_ENTRY = re.compile(rf"[0-9a-f]{{32}}{UNFINISHED_SUFFIX}?")


@dataclass(frozen=True, slots=True)
class VerifiedBlock:
    """A block whose bytes matched its digest when they were written.

    Attributes:
        path: its file.
        block: its index in the layer's digests.
        digest: the digest.
    """

    path: Path
    block: int
    digest: str


@dataclass(frozen=True, slots=True)
class CachedFunction:
    """A folder that holds a function's part of a store.

    Attributes:
        path: the folder.
        fetched: what was fetched by this call; nothing if the folder was there.
        fetched_bytes: bytes of these blocks.
    """

    path: Path
    fetched: tuple[VerifiedBlock, ...] = ()
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Block:
    """A block to be fetched: the offsets and sizes of its pieces in a file that is open."""

    path: Path
    descriptor: int
    block: int
    digest: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.ranges)


class BlockCache:
    """The cache of one sandbox. `ensure` may run beside the other methods, but not beside itself.

    Args:
        folder: the folder of the cache, of which no other sandbox makes use; created if needed.
        peers: the block servers.
        limit_bytes: limit on the bytes of all functions together; None for no limit.
    """

    def __init__(self, folder: Path, peers: PeerClient, *, limit_bytes: int | None = None) -> None:
        self._folder = folder
        self._peers = peers
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] = {}  # by last use, the oldest first
        self._in_use: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():  # of an earlier process, whose use is not known
            if _ENTRY.fullmatch(entry.name):
                shutil.rmtree(entry)

    @property
    def used_bytes(self) -> int:
        """Bytes of all functions in the cache, attached or not."""
        with self._lock:
            return sum(self._sizes.values())

    def ensure(self, spec: FunctionSpec, model_digest: str) -> CachedFunction:
        """Return the folder of a function, which is kept until `release`; fetch it if needed.

        Raises:
            StoreUnavailable: no peer served what the function needs.
            OutOfMemory: it does not fit within the limit beside the functions in use.
        """
        path = self._folder / _folder_name(spec, model_digest)
        with self._lock:
            if path in self._sizes:
                self._sizes[path] = self._sizes.pop(path)
                self._in_use.add(path)
                return CachedFunction(path)
        try:
            return self._fetch(spec, model_digest, path)
        except (PeerError, StoreError) as error:
            raise StoreUnavailable(f"store: {error}", field="store") from error
        except OSError as error:
            message = f"store: {error.filename or path}: cannot be written: {error.strerror}"
            raise StoreUnavailable(message, field="store") from error
        finally:
            self._peers.close_idle()

    def release(self, path: Path) -> None:
        """Let the folder of a function be removed when its space is needed."""
        with self._lock:
            self._in_use.discard(path)

    def _fetch(self, spec: FunctionSpec, model_digest: str, path: Path) -> CachedFunction:
        manifest = self._peers.read_file(
            model_digest, MANIFEST_NAME, lambda text: _parse_manifest(text, model_digest)
        )
        layers = [_layer_entry(manifest, index) for index in spec.layers]
        size_bytes = sum(
            layer.shared_bytes + layer.expert_bytes * len(spec.experts) for layer in layers
        )
        self._make_room(size_bytes)
        unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _create_files(unfinished, manifest)
            blocks = self._fetch_blocks(unfinished, manifest, layers, spec)
            if any(layer.kernel is None for layer in layers):  # its own module reads the config
                self._fetch_model_files(unfinished, manifest)
            (unfinished / MANIFEST_NAME).write_text(json.dumps(manifest.to_json()))
            unfinished.replace(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        with self._lock:
            self._sizes[path] = size_bytes
            self._in_use.add(path)
        verified = tuple(
            VerifiedBlock(path / block.path.relative_to(unfinished), block.block, block.digest)
            for block in blocks
        )
        return CachedFunction(path, verified, sum(block.size_bytes for block in blocks))

    def _make_room(self, size_bytes: int) -> None:
        """Remove functions that are not in use, the least recently used first."""
        if self._limit_bytes is None:
            return
        with self._lock:
            free = self._limit_bytes - sum(self._sizes.values())
            removed: list[Path] = []
            for path, used_bytes in self._sizes.items():
                if free >= size_bytes:
                    break
                if path not in self._in_use:
                    removed.append(path)
                    free += used_bytes
            if free < size_bytes:
                raise OutOfMemory(
                    f"store: cache has {free} bytes that are not in use, the function needs "
                    f"{size_bytes}; raise spec.store.cache.sizeLimit",
                    field="store",
                )
            for path in removed:
                del self._sizes[path]
        for path in removed:
            shutil.rmtree(path)

    def _fetch_blocks(
        self,
        folder: Path,
        manifest: Manifest,
        layers: Sequence[LayerEntry],
        spec: FunctionSpec,
    ) -> list[_Block]:
        """Fetch the blocks of a function into the files of its folder, several at a time."""
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(PARALLEL_BLOCKS))
            headers = pool.map(lambda layer: self._read_header(manifest, layer), layers)
            blocks: list[_Block] = []
            for layer, header in zip(layers, headers, strict=True):
                path = folder / layer.file
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                os.pwrite(descriptor, header, 0)
                blocks += _blocks_of(layer, path, descriptor, spec.experts)
            list(pool.map(self._fetch_block, blocks))
        return blocks

    def _fetch_block(self, block: _Block) -> None:
        def consume(response: HTTPResponse) -> None:
            if response.length != block.size_bytes:
                expected = f"got {response.length} bytes, expected {block.size_bytes}"
                raise PeerError(f"block {block.digest}: {expected}")
            got = page_sum_digest(_written_chunks(response, block))
            if got != block.digest:
                raise PeerError(f"block: got digest {got}, expected {block.digest}")

        if block.size_bytes:
            self._peers.read_block(block.digest, consume)

    def _read_header(self, manifest: Manifest, layer: LayerEntry) -> bytes:
        """Return the beginning of a layer's file, up to its data."""
        digest, name = manifest.digest, layer.file
        start = self._peers.read_file_start(digest, name, HEADER_BYTES)
        size_bytes = 8 + int.from_bytes(start[:8], "little")
        if size_bytes > manifest.files[name].size_bytes:
            raise PeerError(f"{name}: got a header of {size_bytes} bytes, more than the file has")
        if size_bytes > len(start):
            start = self._peers.read_file_start(digest, name, size_bytes)
        return start[:size_bytes]

    def _fetch_model_files(self, folder: Path, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            if not name.startswith(MODEL_PREFIX):
                continue
            check = partial(_checked_file, name=name, expected=entry.sha256)
            (folder / name).write_bytes(self._peers.read_file(manifest.digest, name, check))


def _folder_name(spec: FunctionSpec, model_digest: str) -> str:
    """Return a name for what a function needs; its id does not matter."""
    content = json.dumps([model_digest, list(spec.layers), list(spec.experts)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _parse_manifest(text: bytes, model_digest: str) -> Manifest:
    try:
        manifest = Manifest.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise PeerError(f"{MANIFEST_NAME}: invalid JSON: {error}") from error
    except StoreError as error:
        raise PeerError(f"{MANIFEST_NAME}: {error}") from error
    if manifest.digest != model_digest:
        raise PeerError(f"{MANIFEST_NAME}: got digest {manifest.digest}, expected {model_digest}")
    return manifest


def _checked_file(content: bytes, *, name: str, expected: str) -> bytes:
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise PeerError(f"{name}: got sha256 {got}, expected {expected}")
    return content


def _layer_entry(manifest: Manifest, index: int) -> LayerEntry:
    if index >= len(manifest.layers):
        raise StoreError(f"layer: got {index}, expected 0 to {len(manifest.layers) - 1}")
    layer = manifest.layers[index]
    if not layer.file:
        raise StoreError(
            f"layer {index}: lies in the checkpoint, expected a store that copies "
            "(faasmoe prepare --mode copy)"
        )
    return layer


def _create_files(folder: Path, manifest: Manifest) -> None:
    """Create the files of a store with their sizes and without bytes."""
    folders = {(folder / name).parent for name in manifest.files}
    for parent in {folder, *folders}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, entry in manifest.files.items():
        with (folder / name).open("wb") as file:
            file.truncate(entry.size_bytes)


def _blocks_of(
    layer: LayerEntry, path: Path, descriptor: int, experts: Sequence[int]
) -> Iterator[_Block]:
    """Yield the blocks of some experts of a layer, and that of its shared parameters."""
    mapped = map_tensors(path)
    for block in (*experts, layer.num_experts):
        if block > layer.num_experts:
            raise StoreError(f"expert: got {block}, expected less than {layer.num_experts}")
        pieces = block_pieces(mapped, layer.num_experts, block)
        ranges = tuple((piece.offset, piece.buffer.nbytes) for piece in pieces)
        yield _Block(path, descriptor, block, layer.digests[block], ranges)


def _written_chunks(response: HTTPResponse, block: _Block) -> Iterator[memoryview]:
    """Write what a response has to the pieces of a block; yield it for the digest."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for offset, size_bytes in block.ranges:
        written = 0
        while written < size_bytes:
            chunk = buffer[: min(CHUNK_BYTES, size_bytes - written)]
            if response.readinto(chunk) != len(chunk):
                raise PeerError(f"block {block.digest}: the response ended early")
            _write(block.descriptor, chunk, offset + written)
            yield chunk
            written += len(chunk)


def _write(descriptor: int, chunk: memoryview, offset: int) -> None:
    written = 0
    while written < len(chunk):
        written += os.pwrite(descriptor, chunk[written:], offset + written)
