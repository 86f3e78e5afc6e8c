"""From events to visits: what is told goes to the cache, and what is news there causes a visit."""

from __future__ import annotations

import asyncio
from typing import Protocol

from faasmoe_operator.kube.cache import ObjectCache, ObjectChange, model_of
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import MOEMODEL, POD, Kind, Object
from faasmoe_operator.kube.metrics import OperatorMetrics

GATHER_S = 0.1
"""Changes that come together, as those that a visit makes, lead to one visit."""
GATHER_PODS_S = 1.0
"""Pods change often, and nobody waits for what a visit makes of it."""


class Visits(Protocol):
    """Takes what is to be visited."""

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Have a model visited."""
        ...


class Doubts(Protocol):
    """Takes that something may have gone unnoticed; `resync.Resync` does."""

    def doubt(self, *kinds: Kind) -> None:
        """Have kinds looked at again."""
        ...


class Feed:
    """Takes watch events.

    Args:
        cache: what they go into.
        doubts: told when a watch has begun anew.
        metrics: counts them.
    """

    def __init__(self, cache: ObjectCache, doubts: Doubts, metrics: OperatorMetrics) -> None:
        self.has_begun = asyncio.Event()
        """Set once the watches are on: whatever happens from then on is told."""
        self._cache, self._doubts, self._metrics = cache, doubts, metrics

    def take(self, kind: Kind, type_: str | None, obj: Object) -> None:
        """Take an event, whose type is None for what a watch lists at its beginning."""
        self._metrics.watch_events.labels(str(kind)).inc()
        self.has_begun.set()
        if type_ == "DELETED":
            self._cache.remove(kind, obj)
            return
        self._cache.put(kind, obj)
        if type_ is None:
            self._doubts.doubt(kind)


class Triggers:
    """Causes visits to models of which something has changed.

    Args:
        visits: takes what is to be visited.
    """

    def __init__(self, visits: Visits) -> None:
        self._visits = visits

    def take(self, change: ObjectChange) -> None:
        """Take a change of the cache."""
        if change.kind == MOEMODEL:
            if _is_news(change):
                metadata = change.object["metadata"]
                key = ModelKey(metadata["namespace"], metadata["name"])
                self._visits.add(key, urgent=True)
            return
        delay_s = GATHER_PODS_S if change.kind == POD else GATHER_S
        if (place := model_of(change.object)) is not None:
            self._visits.add(ModelKey(*place), delay_s=delay_s)


def _is_news(change: ObjectChange) -> bool:
    """Return whether more of a MoEModel has changed than its status, which is our own doing."""
    if change.before is None or change.after is None:
        return True
    return _asked(change.before) != _asked(change.after)


def _asked(model: Object) -> tuple[object, ...]:
    metadata = model["metadata"]
    fields = ("uid", "generation", "deletionTimestamp")
    return tuple(metadata.get(field) for field in fields)
