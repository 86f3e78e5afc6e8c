"""From events to visits: what is told goes to the cache, and what is news there causes a visit."""

from __future__ import annotations

import asyncio
from typing import Protocol

from faasmoe_operator.kube.cache import ObjectCache, ObjectChange, labelled_model
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.types import MOEMODEL, POD, Kind, ModelKey, Object

DEBOUNCE_S = 0.1
"""Changes that come together, as those that a visit makes, lead to one visit."""
POD_DEBOUNCE_S = 1.0
"""Pods change often, and nobody waits for what a visit makes of it."""


class ReconcileQueue(Protocol):
    """Takes what is to be visited."""

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Have a model visited."""
        ...


class RelistScheduler(Protocol):
    """Takes that something may have gone unnoticed; `resync.Resync` does."""

    def schedule_relist(self, *kinds: Kind) -> None:
        """Have kinds looked at again."""
        ...


class CacheUpdater:
    """Takes watch events.

    Args:
        cache: what they go into.
        doubts: told when a watch has begun anew.
        metrics: counts them.
    """

    def __init__(
        self, cache: ObjectCache, relists: RelistScheduler, metrics: OperatorMetrics
    ) -> None:
        self.has_synced = asyncio.Event()
        """Set once the watches are on: whatever happens from then on is told."""
        self._cache, self._relists, self._metrics = cache, relists, metrics

    def on_event(self, kind: Kind, event_type: str | None, obj: Object) -> None:
        """Take an event, whose type is None for what a watch lists at its beginning."""
        self._metrics.watch_events.labels(str(kind)).inc()
        self.has_synced.set()
        if event_type == "DELETED":
            self._cache.delete(kind, obj)
            return
        self._cache.update(kind, obj)
        if event_type is None:
            self._relists.schedule_relist(kind)


class ModelEnqueuer:
    """Causes visits to models of which something has changed.

    Args:
        visits: takes what is to be visited.
    """

    def __init__(self, queue: ReconcileQueue) -> None:
        self._queue = queue

    def on_change(self, change: ObjectChange) -> None:
        """Take a change of the cache."""
        if change.kind == MOEMODEL:
            if _is_spec_changed(change):
                metadata = change.object["metadata"]
                key = ModelKey(metadata["namespace"], metadata["name"])
                self._queue.add(key, urgent=True)
            return
        delay_s = POD_DEBOUNCE_S if change.kind == POD else DEBOUNCE_S
        if (model := labelled_model(change.object)) is not None:
            self._queue.add(ModelKey(*model), delay_s=delay_s)


def _is_spec_changed(change: ObjectChange) -> bool:
    """Return whether more of a MoEModel has changed than its status, which is our own doing."""
    if change.old is None or change.new is None:
        return True
    return _spec_identity(change.old) != _spec_identity(change.new)


def _spec_identity(model: Object) -> tuple[object, ...]:
    metadata = model["metadata"]
    fields = ("uid", "generation", "deletionTimestamp")
    return tuple(metadata.get(field) for field in fields)
