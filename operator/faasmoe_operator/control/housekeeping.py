"""What a control does on the side: keeps the popularity, reads ahead while idle, tells changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from faasmoe_expert.store import Store, StoreError
from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.popularity_file import PopularityFile
from faasmoe_operator.control.read_ahead import (
    MAX_SHARE_OF_FREE_MEMORY,
    free_memory_bytes,
    read_ahead,
)
from faasmoe_operator.plan.fleet import SandboxState

logger = logging.getLogger(__name__)


class Housekeeping:
    """Runs beside a controller until cancelled."""

    def __init__(self, controller: Controller, *, store: Store, file: PopularityFile) -> None:
        self._controller = controller
        self._store = store
        self._file = file
        self._saved: dict[str, float] = {}
        self._told = ""

    async def run(self) -> None:
        """Do all of it until cancelled; the popularity is written a last time then."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._save, self._read_ahead, self._tell):
                    group.create_task(work())
        finally:
            if (rows := self._unsaved()) is not None:
                self._file.write(rows)

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(self._controller.timing.save_interval_s)
            if (rows := self._unsaved()) is not None:
                await asyncio.to_thread(self._file.write, rows)

    def _unsaved(self) -> dict[str, float] | None:
        """Return the popularity if it has to be written."""
        rows = self._controller.records.popularity(self._controller.clock())
        if rows == self._saved:
            return None
        self._saved = rows
        return rows

    async def _read_ahead(self) -> None:
        while True:
            if self._is_idle():
                await asyncio.to_thread(self._ask_to_read, self._popular())
            await asyncio.sleep(self._controller.timing.read_ahead_interval_s)

    def _is_idle(self) -> bool:
        controller = self._controller
        held = controller.reports.held(controller.clock())
        return held == 0 and not controller.records.waiting()

    def _popular(self) -> list[tuple[FunctionSpec, int]]:
        """Return the functions at zero that were used lately, with their sizes."""
        controller = self._controller
        ready, known = controller.fleet.ready(), controller.model.functions
        names = controller.records.popular(controller.clock())
        return [(known[n].spec, known[n].size_bytes) for n in names if n not in ready]

    def _ask_to_read(self, functions: Sequence[tuple[FunctionSpec, int]]) -> None:
        max_bytes = int(free_memory_bytes() * MAX_SHARE_OF_FREE_MEMORY)
        try:
            count = read_ahead(self._store, functions, max_bytes=max_bytes)
        except (StoreError, OSError) as error:
            logger.warning("nothing is read ahead: %s", error)
        else:
            logger.debug("%d popular functions are read ahead", count)

    async def _tell(self) -> None:
        while True:
            self._tell_change()
            await asyncio.sleep(self._controller.timing.tell_interval_s)

    def _tell_change(self) -> None:
        controller = self._controller
        functions, scalers = controller.model.functions, controller.scalers
        states = controller.fleet.states()
        ready = controller.fleet.ready()
        n_starting = sum(scalers.desired(n) > 0 and n not in ready for n in functions)
        text = (
            f"functions: {len(ready)} of {len(functions)} up, {n_starting} starting, "
            f"{ready.total()} replicas; sandboxes: {states[SandboxState.READY]} ready, "
            f"{states[SandboxState.STARTING]} starting, {controller.fleet.n_generic()} generic"
        )
        if text != self._told:
            logger.info("%s", text)
            self._told = text
