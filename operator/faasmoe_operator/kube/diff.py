"""Diff between desired and live objects: what to create, apply, replace or delete. Pure.

Objects that the MoEModel does not own are never changed. Whether an owned object needs an apply is
decided without a request. The API server adds defaults and normalizes values ("1000m" becomes "1"),
so a live object rarely equals the desired one. Three facts decide instead:

- the hash of the desired object in an annotation: it differs if another desired state was applied,
  even by an earlier operator process;
- whether the live object literally contains the desired one: then nothing needs to be done;
- the fingerprint of the live object after our last apply: a difference to the desired object that
  has not changed since is the server's normalization.

The same desired state is not reapplied to an object within some seconds, so that a conflict with
another controller does not become a busy loop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.kube.cache import controller_uid
from faasmoe_operator.kube.manifests.names import (
    FIELD_MANAGER,
    MANAGED_BY_LABEL,
    MODEL_LABEL,
    TEMPLATE_LABEL,
)
from faasmoe_operator.kube.types import JOB, PERSISTENT_VOLUME_CLAIM, SECRET, Kind, Object, kind_of

LAST_APPLIED_HASH_ANNOTATION = "faasmoe.dev/intent-hash"
HASH_CHARS = 16
_APPLIED_METADATA = ("labels", "annotations", "ownerReferences")
REAPPLY_INTERVAL_S = 5.0
ObjectId = tuple[Kind, str]  # kind and name, in the model's namespace


@dataclass(frozen=True, slots=True)
class Owner:
    """The MoEModel that owns objects.

    Attributes:
        uid: its uid.
        name: its name.
    """

    uid: str
    name: str

    def owns(self, live: Object) -> bool:
        """Return whether an object belongs to this model.

        A retained claim has no controller; it belongs to the model of the name in its label.
        """
        controller = controller_uid(live)
        if controller is not None:
            return controller == self.uid
        labels = live["metadata"].get("labels", {})
        is_managed = labels.get(MANAGED_BY_LABEL) == FIELD_MANAGER
        return (
            kind_of(live) == PERSISTENT_VOLUME_CLAIM
            and is_managed
            and labels.get(MODEL_LABEL) == self.name
        )

    def is_from_predecessor(self, live: Object) -> bool:
        """Return whether an object belongs to a deleted MoEModel of the same name."""
        return any(
            reference.get("kind") == "MoEModel" and reference.get("name") == self.name
            for reference in live["metadata"].get("ownerReferences", ())
            if reference.get("controller") and reference.get("uid") != self.uid
        )


def desired_hash(desired: Object) -> str:
    """Return the hash of a desired object."""
    return _digest(desired)


def with_last_applied_hash(desired: Object) -> Object:
    """Return a desired object with its hash in an annotation."""
    annotations = {
        **desired["metadata"].get("annotations", {}),
        LAST_APPLIED_HASH_ANNOTATION: desired_hash(desired),
    }
    return {**desired, "metadata": {**desired["metadata"], "annotations": annotations}}


def last_applied_hash(live: Object) -> str | None:
    """Return the hash of the desired object that was applied last; None if none was."""
    annotations: Mapping[str, str] = live["metadata"].get("annotations", {})
    return annotations.get(LAST_APPLIED_HASH_ANNOTATION)


def fingerprint(live: Object, desired: Object) -> str:
    """Return a hash of the parts of a live object that an apply can affect.

    Excludes the status, server-set metadata, and labels and annotations of others.
    """
    metadata = {}
    for field in _APPLIED_METADATA:
        value = live["metadata"].get(field)
        if isinstance(value, Mapping):
            applied = desired["metadata"].get(field, {})
            value = {key: entry for key, entry in value.items() if key in applied}
        metadata[field] = value or None
    body = {key: value for key, value in live.items() if key not in ("metadata", "status")}
    return _digest({**body, "metadata": metadata})


def contains_desired(live: Any, desired: Any) -> bool:
    """Return whether a live value literally contains a desired one.

    A live mapping may have more keys. A live list must have the same length: an additional
    container, port or owner is someone's edit.
    """
    if isinstance(desired, Mapping):
        return isinstance(live, Mapping) and all(
            _contains_field(live, key, value) for key, value in desired.items()
        )
    if isinstance(desired, list):
        return (
            isinstance(live, list)
            and len(live) == len(desired)
            and all(contains_desired(one, other) for one, other in zip(live, desired, strict=True))
        )
    return bool(live == desired) and isinstance(live, bool) == isinstance(desired, bool)


def _contains_field(live: Mapping[str, Any], key: str, desired: Any) -> bool:
    if desired in (None, {}, []) and key not in live:
        return True  # the server drops empty fields
    return key in live and contains_desired(live[key], desired)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]


@dataclass(frozen=True, slots=True)
class LastApplied:
    """The last apply of an object.

    Attributes:
        desired_hash: hash of the desired object.
        fingerprint: fingerprint of the live object after the apply.
        applied_at: when, by the monotonic clock, in seconds.
    """

    desired_hash: str
    fingerprint: str
    applied_at: float


@dataclass(frozen=True, slots=True)
class CreateObject:
    """Create an object that is not in the cache; it may exist nevertheless."""

    desired: Object


@dataclass(frozen=True, slots=True)
class ApplyObject:
    """Bring an owned object to its desired state."""

    desired: Object
    live: Object


@dataclass(frozen=True, slots=True)
class ReplaceObject:
    """Delete an owned object that is immutable; it is created again once it is gone."""

    live: Object


@dataclass(frozen=True, slots=True)
class DeleteObject:
    """Delete an owned object that is no longer desired."""

    live: Object


@dataclass(frozen=True, slots=True)
class NotOwned:
    """Report an object that has the name of a desired one but is not owned.

    Attributes:
        live: the existing object.
        is_terminating: whether it belongs to a deleted MoEModel of the same name.
    """

    live: Object
    is_terminating: bool


ObjectAction = CreateObject | ApplyObject | ReplaceObject | DeleteObject | NotOwned


@dataclass(frozen=True, slots=True)
class ActionPlan:
    """Actions to execute now, in order.

    Attributes:
        actions: the actions.
        requeue_at: when to plan again even without a change, by the monotonic clock; None for
            never.
    """

    actions: tuple[ObjectAction, ...]
    requeue_at: float | None = None


def object_id(obj: Object) -> ObjectId:
    """Return kind and name of an object."""
    return kind_of(obj), obj["metadata"]["name"]


def plan_actions(
    desired: Iterable[Object],
    live: Iterable[Object],
    *,
    owner: Owner,
    last_applied: Mapping[ObjectId, LastApplied],
    prune: bool,
    now: float,
) -> ActionPlan:
    """Return the actions that bring live objects to their desired state.

    Args:
        desired: every object that the model should have, in the order of creation.
        live: existing objects of this owner or with a desired name, except Secrets, which are
            never read.
        owner: the model.
        last_applied: earlier applies by object.
        prune: whether to delete owned objects that are not desired.
        now: the monotonic clock, in seconds.
    """
    desired_by_id = {object_id(obj): obj for obj in desired}
    live_by_id = {object_id(obj): obj for obj in live}
    actions: list[ObjectAction] = []
    requeue_at: list[float] = []
    for object_key, obj in desired_by_id.items():
        previous = last_applied.get(object_key)
        action = _action_for(obj, live_by_id.get(object_key), owner=owner, previous=previous)
        allowed_at = _earliest_apply_at(action, previous)
        if allowed_at > now:
            requeue_at.append(allowed_at)
        elif action is not None:
            actions.append(action)
    prunable = [obj for key, obj in live_by_id.items() if prune and key not in desired_by_id]
    actions += [DeleteObject(obj) for obj in prunable if _is_prunable(obj, owner)]
    return ActionPlan(tuple(actions), min(requeue_at, default=None))


def _earliest_apply_at(action: ObjectAction | None, previous: LastApplied | None) -> float:
    """Return when an action is allowed: the same desired state is not reapplied at once."""
    if previous is None or not isinstance(action, ApplyObject):
        return -math.inf
    is_unchanged = previous.desired_hash == desired_hash(action.desired)
    return previous.applied_at + REAPPLY_INTERVAL_S if is_unchanged else -math.inf


def _action_for(
    desired: Object, live: Object | None, *, owner: Owner, previous: LastApplied | None
) -> ObjectAction | None:
    if live is None:
        is_created = kind_of(desired) == SECRET and previous is not None
        return None if is_created else CreateObject(desired)
    if not owner.owns(live):
        return NotOwned(live, is_terminating=owner.is_from_predecessor(live))
    if "deletionTimestamp" in live["metadata"]:
        return None
    if kind_of(live) == JOB:
        return _job_action(desired, live, previous)
    return _apply_if_drifted(desired, live, previous)


def _apply_if_drifted(
    desired: Object, live: Object, previous: LastApplied | None
) -> ApplyObject | None:
    return None if _matches_desired(live, desired, previous) else ApplyObject(desired, live)


def _job_action(
    desired: Object, live: Object, previous: LastApplied | None
) -> ReplaceObject | ApplyObject | None:
    """Return the action for a Job: its pod template is immutable; a finished one stays."""
    if has_job_condition(live, "Complete"):
        return None
    if _template_hash(desired) != _template_hash(live):
        return ReplaceObject(live)
    return None if has_job_condition(live, "Failed") else _apply_if_drifted(desired, live, previous)


def has_job_condition(job: Object, condition_type: str) -> bool:
    """Return whether a Job has a condition, `Complete` or `Failed`, that is True."""
    conditions = job.get("status", {}).get("conditions", ())
    return any(c.get("type") == condition_type and c.get("status") == "True" for c in conditions)


def _template_hash(job: Object) -> str | None:
    found: str | None = job["metadata"].get("labels", {}).get(TEMPLATE_LABEL)
    return found


def _matches_desired(live: Object, desired: Object, previous: LastApplied | None) -> bool:
    expected_hash = desired_hash(desired)
    if last_applied_hash(live) != expected_hash:
        return False
    if contains_desired(live, desired):
        return True
    if previous is None or previous.desired_hash != expected_hash:
        return False
    return previous.fingerprint == fingerprint(live, desired)


def _is_prunable(live: Object, owner: Owner) -> bool:
    """Return whether an object was applied by a plan: sandbox pods, for example, were not."""
    is_terminating = "deletionTimestamp" in live["metadata"]
    return (
        not is_terminating
        and last_applied_hash(live) is not None
        and controller_uid(live) == owner.uid
    )
