"""The calls of one batch that are in flight, on the load meter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from faasmoe_expert.table import FunctionEntry
from faasmoe_router.dispatch.batch import LayerBatch
from faasmoe_router.dispatch.load import LoadMeter


class InFlight:
    """The load of one batch's calls: each is in flight until its part is there."""

    def __init__(
        self, load: LoadMeter, batch: LayerBatch, entries: Mapping[int, FunctionEntry]
    ) -> None:
        self._load = load
        self._batch = batch
        self._open = {i: entry.spec.id for i, entry in entries.items()}

    def __enter__(self) -> Self:
        """Count all as begun."""
        now_s = time.monotonic()
        for i, function_id in self._open.items():
            self._load.begin(function_id, now_s, rows=len(self._batch.groups[i].rows))
        return self

    def end(self, position: int) -> None:
        """Count the part at this position as there."""
        self._load.end(self._open.pop(position), time.monotonic())

    def __exit__(self, *_: object) -> None:
        """Count what is still open as ended."""
        for position in list(self._open):
            self.end(position)
