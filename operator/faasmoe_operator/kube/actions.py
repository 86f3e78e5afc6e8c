"""From what is wanted and what there is to what is to be done. Pure.

Nothing is to be done to an object that is as it was asked for (see `intent`), to one that is on its
way out, and to one that is not ours, whose name is a clash. An intent is not applied to the same
object twice within some seconds: if another controller undoes what we do, both do it slowly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from faasmoe_operator.kube.cache import controller_uid
from faasmoe_operator.kube.intent import applied_hash, fingerprint, holds, intent_hash
from faasmoe_operator.kube.kinds import JOB, SECRET, Kind, Object, kind_of
from faasmoe_operator.kube.manifests.names import TEMPLATE_LABEL
from faasmoe_operator.kube.ownership import Owner

REAPPLY_INTERVAL_S = 5.0

ObjectId = tuple[Kind, str]  # kind and name, in the model's namespace


@dataclass(frozen=True, slots=True)
class Applied:
    """What we asked for last, and what the object was like then.

    Attributes:
        intent: hash of the intent.
        fingerprint: of the live object after it.
        at: when.
    """

    intent: str
    fingerprint: str
    at: float


@dataclass(frozen=True, slots=True)
class Create:
    """Make an object that the cache does not have; it may exist all the same."""

    wanted: Object


@dataclass(frozen=True, slots=True)
class Apply:
    """Make an object of ours be as wanted."""

    wanted: Object
    live: Object


@dataclass(frozen=True, slots=True)
class Replace:
    """Delete an object of ours that cannot be changed in place; it is created once it is gone."""

    live: Object


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete an object of ours that is wanted no longer."""

    live: Object


@dataclass(frozen=True, slots=True)
class NameClash:
    """Leave an object alone that has the name of a wanted one.

    Attributes:
        live: the other's object.
        going: it is a former MoEModel's of this name, and on its way out.
    """

    live: Object
    going: bool


Action = Create | Apply | Replace | Delete | NameClash


@dataclass(frozen=True, slots=True)
class Actions:
    """What is to be done, in this order.

    Attributes:
        actions: at once.
        again_at: when more may be due though nothing happens; None for never.
    """

    actions: tuple[Action, ...]
    again_at: float | None = None


def object_id(obj: Object) -> ObjectId:
    """Return what names an object in its namespace."""
    return kind_of(obj), obj["metadata"]["name"]


def plan_actions(
    wanted: Iterable[Object],
    live: Iterable[Object],
    *,
    owner: Owner,
    applied: Mapping[ObjectId, Applied],
    prune: bool,
    now: float,
) -> Actions:
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
    intents = {object_id(obj): obj for obj in wanted}
    there = {object_id(obj): obj for obj in live}
    actions: list[Action] = []
    again_at: list[float] = []
    for name, obj in intents.items():
        before = applied.get(name)
        action = _action(obj, there.get(name), owner=owner, before=before)
        allowed_at = _allowed_at(action, before)
        if allowed_at > now:
            again_at.append(allowed_at)
        elif action is not None:
            actions.append(action)
    surplus = [obj for name, obj in there.items() if prune and name not in intents]
    actions += [Delete(obj) for obj in surplus if _is_surplus(obj, owner)]
    return Actions(tuple(actions), min(again_at, default=None))


def _allowed_at(action: Action | None, before: Applied | None) -> float:
    """Return from when an action may be taken: an intent is not applied again at once."""
    if before is None or not isinstance(action, Apply):
        return -math.inf
    same = before.intent == intent_hash(action.wanted)
    return before.at + REAPPLY_INTERVAL_S if same else -math.inf


def _action(
    wanted: Object, live: Object | None, *, owner: Owner, before: Applied | None
) -> Action | None:
    if live is None:
        known = kind_of(wanted) == SECRET and before is not None
        return None if known else Create(wanted)
    if not owner.owns(live):
        return NameClash(live, going=owner.preceded(live))
    if "deletionTimestamp" in live["metadata"]:
        return None
    if kind_of(live) == JOB:
        return _job_action(wanted, live, before)
    return _update(wanted, live, before)


def _update(wanted: Object, live: Object, before: Applied | None) -> Apply | None:
    return None if _is_as_wanted(live, wanted, before) else Apply(wanted, live)


def _job_action(wanted: Object, live: Object, before: Applied | None) -> Replace | Apply | None:
    """Return what to do to a Job: its pods cannot be changed, and one that has ended is left."""
    if is_finished(live, "Complete"):
        return None
    if _template_of(wanted) != _template_of(live):
        return Replace(live)
    return None if is_finished(live, "Failed") else _update(wanted, live, before)


def is_finished(job: Object, how: str) -> bool:
    """Return whether a Job has ended as `Complete` or as `Failed`."""
    conditions = job.get("status", {}).get("conditions", ())
    return any(c.get("type") == how and c.get("status") == "True" for c in conditions)


def _template_of(job: Object) -> str | None:
    found: str | None = job["metadata"].get("labels", {}).get(TEMPLATE_LABEL)
    return found


def _is_as_wanted(live: Object, wanted: Object, before: Applied | None) -> bool:
    intent = intent_hash(wanted)
    if applied_hash(live) != intent:
        return False
    if holds(live, wanted):
        return True
    if before is None or before.intent != intent:
        return False
    return before.fingerprint == fingerprint(live, wanted)


def _is_surplus(live: Object, owner: Owner) -> bool:
    """Return whether an object was planned once: others of this owner are made elsewhere."""
    going = "deletionTimestamp" in live["metadata"]
    return not going and applied_hash(live) is not None and controller_uid(live) == owner.uid
