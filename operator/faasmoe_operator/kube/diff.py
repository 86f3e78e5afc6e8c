"""Whose an object is: nothing is changed or deleted that is not the MoEModel's own. Pure.

Whether a live object still is what was asked for, told without asking the API. Pure.

The API server adds defaults and writes values in its own way ("1000m" is "1"), so a live object
can rarely be compared with the intent as it stands. Three things tell whether an apply is due:

- the intent's hash, kept in an annotation of the object: it differs if another intent was applied,
  by an earlier operator too;
- what of the intent the object holds literally: if all of it, nothing is to be done;
- the live object's fingerprint after our last apply: what differs from the intent but has not
  changed since is the server's way of writing it.

From what is wanted and what there is to what is to be done. Pure.

Nothing is to be done to an object that is as it was asked for (see `intent`), to one that is on its
way out, and to one that is not ours, whose name is a clash. An intent is not applied to the same
object twice within some seconds: if another controller undoes what we do, both do it slowly.
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


@dataclass(frozen=True, slots=True)
class Owner:
    """The MoEModel that objects are made for.

    Attributes:
        uid: its uid.
        name: its name.
    """

    uid: str
    name: str

    def owns(self, live: Object) -> bool:
        """Return whether an object is this model's.

        A claim that outlives its model has no owner; it is that of whatever model has the name.
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
        """Return whether an object is of a MoEModel of this name that was deleted before."""
        return any(
            reference.get("kind") == "MoEModel" and reference.get("name") == self.name
            for reference in live["metadata"].get("ownerReferences", ())
            if reference.get("controller") and reference.get("uid") != self.uid
        )


LAST_APPLIED_HASH_ANNOTATION = "faasmoe.dev/intent-hash"
HASH_CHARS = 16
_APPLIED_METADATA = ("labels", "annotations", "ownerReferences")


def desired_hash(desired: Object) -> str:
    """Return the hash of what is asked for."""
    return _digest(desired)


def with_last_applied_hash(desired: Object) -> Object:
    """Return an intent with its hash in an annotation."""
    annotations = {
        **desired["metadata"].get("annotations", {}),
        LAST_APPLIED_HASH_ANNOTATION: desired_hash(desired),
    }
    return {**desired, "metadata": {**desired["metadata"], "annotations": annotations}}


def last_applied_hash(live: Object) -> str | None:
    """Return the hash of the intent that was applied last."""
    found: str | None = live["metadata"].get("annotations", {}).get(LAST_APPLIED_HASH_ANNOTATION)
    return found


def fingerprint(live: Object, desired: Object) -> str:
    """Return a hash of all of a live object that could be the intent's doing.

    Left out are the status, what the server counts, and labels and annotations of others.
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
    """Return whether all that is wanted stands in a live value literally.

    An object may have more keys than are wanted. A list must have the same length: one more
    container, port or owner is somebody's edit.
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
        return True  # the server drops what is empty
    return key in live and contains_desired(live[key], desired)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]


REAPPLY_INTERVAL_S = 5.0

ObjectId = tuple[Kind, str]  # kind and name, in the model's namespace


@dataclass(frozen=True, slots=True)
class LastApplied:
    """What we asked for last, and what the object was like then.

    Attributes:
        intent: hash of the intent.
        fingerprint: of the live object after it.
        at: when.
    """

    desired_hash: str
    fingerprint: str
    applied_at: float


@dataclass(frozen=True, slots=True)
class CreateObject:
    """Make an object that the cache does not have; it may exist all the same."""

    desired: Object


@dataclass(frozen=True, slots=True)
class ApplyObject:
    """Make an object of ours be as wanted."""

    desired: Object
    live: Object


@dataclass(frozen=True, slots=True)
class ReplaceObject:
    """Delete an object of ours that cannot be changed in place; it is created once it is gone."""

    live: Object


@dataclass(frozen=True, slots=True)
class DeleteObject:
    """Delete an object of ours that is wanted no longer."""

    live: Object


@dataclass(frozen=True, slots=True)
class NotOwned:
    """Leave an object alone that has the name of a wanted one.

    Attributes:
        live: the other's object.
        going: it is a former MoEModel's of this name, and on its way out.
    """

    live: Object
    is_terminating: bool


ObjectAction = CreateObject | ApplyObject | ReplaceObject | DeleteObject | NotOwned


@dataclass(frozen=True, slots=True)
class ActionPlan:
    """What is to be done, in this order.

    Attributes:
        actions: at once.
        again_at: when more may be due though nothing happens; None for never.
    """

    actions: tuple[ObjectAction, ...]
    requeue_at: float | None = None


def object_id(obj: Object) -> ObjectId:
    """Return what names an object in its namespace."""
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
    """Return what is to be done.

    Args:
        wanted: every object that the model is to have, in the order of making.
        live: the objects that there are with a wanted name or of this owner; secrets are not
            among them, as nobody reads them.
        owner: the model.
        applied: what was asked for earlier.
        prune: whether what the owner has and does not want is to go.
        now: the time.
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
    prunable = [obj for name, obj in live_by_id.items() if prune and name not in desired_by_id]
    actions += [DeleteObject(obj) for obj in prunable if _is_prunable(obj, owner)]
    return ActionPlan(tuple(actions), min(requeue_at, default=None))


def _earliest_apply_at(action: ObjectAction | None, previous: LastApplied | None) -> float:
    """Return from when an action may be taken: an intent is not applied again at once."""
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
    """Return what to do to a Job: its pods cannot be changed, and one that has ended is left."""
    if has_job_condition(live, "Complete"):
        return None
    if _template_hash(desired) != _template_hash(live):
        return ReplaceObject(live)
    return None if has_job_condition(live, "Failed") else _apply_if_drifted(desired, live, previous)


def has_job_condition(job: Object, condition_type: str) -> bool:
    """Return whether a Job has ended as `Complete` or as `Failed`."""
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
    """Return whether an object was planned once: others of this owner are made elsewhere."""
    is_terminating = "deletionTimestamp" in live["metadata"]
    return (
        not is_terminating
        and last_applied_hash(live) is not None
        and controller_uid(live) == owner.uid
    )
