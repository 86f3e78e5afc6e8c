"""Event handlers: a change in the object cache enqueues the MoEModel that it concerns."""

from __future__ import annotations

from typing import Protocol

from faasmoe_operator.kube.cache import ObjectChange, labelled_model
from faasmoe_operator.kube.types import MOEMODEL, POD, ModelKey, Object

DEBOUNCE_S = 0.1
"""Merges changes that come together, such as those that a reconcile makes, into one reconcile."""
POD_DEBOUNCE_S = 1.0
"""Pods change often, and what a reconcile derives from them (status) is not urgent."""


class ReconcileQueue(Protocol):
    """Accepts keys to reconcile."""

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Enqueue a model; see WorkQueue.add."""
        ...


class ModelEnqueuer:
    """Enqueues the model that a changed object belongs to.

    Args:
        queue: the queue of models to reconcile.
    """

    def __init__(self, queue: ReconcileQueue) -> None:
        self._queue = queue

    def on_change(self, change: ObjectChange) -> None:
        """Handle a change of the cache."""
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
    """Return whether a MoEModel was added, deleted, or changed in more than its status."""
    if change.old is None or change.new is None:
        return True
    return _spec_identity(change.old) != _spec_identity(change.new)


def _spec_identity(model: Object) -> tuple[object, ...]:
    metadata = model["metadata"]
    fields = ("uid", "generation", "deletionTimestamp")
    return tuple(metadata.get(field) for field in fields)
