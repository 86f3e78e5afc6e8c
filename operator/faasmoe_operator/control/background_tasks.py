"""Background tasks of a control process: popularity persistence, read-ahead and state logging.

Read-ahead asks the kernel to load the weights of recently used functions into the page cache while
the model is idle, so that a later activation does not wait for the disk. It takes a share of the
free memory only and never blocks the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.tensors import MappedFile, TensorPiece
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.state_files import PopularityFile
from faasmoe_operator.plan.fleet import SandboxState

MAX_SHARE_OF_FREE_MEMORY = 0.25

logger = logging.getLogger(__name__)


class BackgroundTasks:
    """Runs all background tasks of a controller.

    Args:
        controller: the running controller.
        store: the model's store on this machine.
        popularity_file: where the popularity is saved.
    """

    def __init__(
        self, controller: Controller, *, store: Store, popularity_file: PopularityFile
    ) -> None:
        self._controller = controller
        self._store = store
        self._popularity_file = popularity_file
        self._saved_popularity: dict[str, float] = {}
        self._last_summary = ""
        self._logged_revision = -1

    async def run(self) -> None:
        """Run all tasks until cancelled, then save the popularity a last time."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._save_popularity_loop, self._read_ahead_loop, self._log_loop):
                    group.create_task(work())
        finally:
            if (rows := self._unsaved_popularity()) is not None:
                self._popularity_file.write(rows)

    async def _save_popularity_loop(self) -> None:
        while True:
            await asyncio.sleep(self._controller.timing.popularity_save_interval_s)
            if (rows := self._unsaved_popularity()) is not None:
                await asyncio.to_thread(self._popularity_file.write, rows)

    def _unsaved_popularity(self) -> dict[str, float] | None:
        """Return the popularity if it changed since the last call."""
        rows = self._controller.function_stats.popularity_by_stable_key(self._controller.clock())
        if rows == self._saved_popularity:
            return None
        self._saved_popularity = rows
        return rows

    async def _read_ahead_loop(self) -> None:
        while True:
            if self._is_idle():
                await asyncio.to_thread(self._read_ahead, self._read_ahead_candidates())
            await asyncio.sleep(self._controller.timing.read_ahead_interval_s)

    def _is_idle(self) -> bool:
        controller = self._controller
        queued = controller.load_reports.queued(controller.clock())
        return queued == 0 and not controller.function_stats.activating()

    def _read_ahead_candidates(self) -> list[tuple[FunctionSpec, int]]:
        """Return the recently used functions at zero with their sizes in bytes."""
        controller = self._controller
        ready, known = controller.fleet.ready_replicas(), controller.model.functions
        names = controller.function_stats.recently_used(controller.clock())
        return [(known[n].spec, known[n].size_bytes) for n in names if n not in ready]

    def _read_ahead(self, functions: Sequence[tuple[FunctionSpec, int]]) -> None:
        max_bytes = int(free_memory_bytes() * MAX_SHARE_OF_FREE_MEMORY)
        try:
            count = read_ahead(self._store, functions, max_bytes=max_bytes)
        except (StoreError, OSError) as error:
            logger.warning("read-ahead failed: %s", error)
        else:
            logger.debug("read ahead the weights of %d functions", count)

    async def _log_loop(self) -> None:
        while True:
            self._log_if_changed()
            await asyncio.sleep(self._controller.timing.log_interval_s)

    def _log_if_changed(self) -> None:
        controller = self._controller
        if controller.revision == self._logged_revision:
            return
        self._logged_revision = controller.revision
        functions, autoscalers = controller.model.functions, controller.autoscalers
        states = controller.fleet.sandbox_states()
        ready = controller.fleet.ready_replicas()
        n_starting = sum(autoscalers.desired(n) > 0 and n not in ready for n in functions)
        summary = (
            f"functions: {len(ready)} of {len(functions)} up, {n_starting} starting, "
            f"{ready.total()} replicas; sandboxes: {states[SandboxState.READY]} ready, "
            f"{states[SandboxState.STARTING]} starting, {controller.fleet.n_generic()} generic"
        )
        if summary != self._last_summary:
            logger.info("%s: %s", controller.model.name, summary)
            self._last_summary = summary


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of bytes in a file of the store."""

    path: Path
    offset: int
    length: int


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the memory in bytes that is available without swapping; 0 if it is unknown."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    fields = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in fields), 0)


def read_ahead(
    store: Store, functions: Iterable[tuple[FunctionSpec, int]], *, max_bytes: int
) -> int:
    """Ask the kernel to read functions' weights; return the number of functions.

    Args:
        store: the store that holds the weights.
        functions: each function and its size in bytes, the most important first.
        max_bytes: maximum total size of the functions.

    Raises:
        StoreError: the store is damaged.
        OSError: a file of the store cannot be read.
    """
    count = 0
    for spec, size_bytes in functions:
        max_bytes -= size_bytes
        if max_bytes < 0:
            break
        for part in byte_ranges(store, spec):
            _advise_will_need(part)
        count += 1
    return count


def byte_ranges(store: Store, spec: FunctionSpec) -> Iterator[ByteRange]:
    """Yield the ranges of the store's files that hold the weights of a function's experts."""
    for index in spec.layers:
        layer, mapped = store.layer_entry(index), store.map_layer(index)
        for view in mapped.tensors.values():
            pieces = view.pieces
            if view.is_stacked(layer.num_experts):
                pieces = tuple(
                    piece for expert in spec.experts for piece in view.expert_pieces(expert)
                )
            yield from _joined(pieces, mapped.files)


def _joined(pieces: Sequence[TensorPiece], files: Sequence[MappedFile]) -> Iterator[ByteRange]:
    """Yield the ranges of pieces, those that follow each other as one."""
    start = end = file = -1
    for piece in pieces:
        if (piece.file, piece.offset) != (file, end):
            if end > start:
                yield ByteRange(files[file].path, start, end - start)
            file, start, end = piece.file, piece.offset, piece.offset
        end += piece.buffer.nbytes
    if end > start:
        yield ByteRange(files[file].path, start, end - start)


def _advise_will_need(part: ByteRange) -> None:
    descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, part.offset, part.length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
