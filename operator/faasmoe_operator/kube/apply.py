"""Executes planned actions: the only module that writes the objects of models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.conditions import ConditionState, condition_false, condition_unknown
from faasmoe_operator.kube.diff import (
    ApplyObject,
    CreateObject,
    DeleteObject,
    LastApplied,
    NotOwned,
    ObjectAction,
    ObjectId,
    Owner,
    ReplaceObject,
    desired_hash,
    fingerprint,
    last_applied_hash,
    object_id,
    with_last_applied_hash,
)
from faasmoe_operator.kube.errors import (
    Conflict,
    Forbidden,
    KubeApiError,
    NamespaceTerminating,
    Unavailable,
)
from faasmoe_operator.kube.types import JOB, SECRET, Object, kind_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApplyFailure:
    """An object that could not be brought to its desired state.

    Attributes:
        object_id: kind and name of the object.
        condition: the resulting state of the condition that covers the object.
    """

    object_id: ObjectId
    condition: ConditionState


class Applier:
    """Executes actions on one model's objects and records what was applied.

    Args:
        api: the API server.
        cache: receives the responses, so that the next plan sees the changes.
        owner: the model.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self, api: KubeApi, cache: ObjectCache, owner: Owner, *, clock: Callable[[], float]
    ) -> None:
        self.owner = owner
        self.last_applied: dict[ObjectId, LastApplied] = {}
        self._api, self._cache, self._clock = api, cache, clock

    async def execute(self, action: ObjectAction) -> ApplyFailure | None:
        """Execute an action; return a failure if the API rejects it.

        Raises:
            Unavailable: the API server does not respond.
            NamespaceTerminating: the namespace is being deleted.
        """
        try:
            return await self._execute(action)
        except (Unavailable, NamespaceTerminating):
            raise
        except KubeApiError as error:
            obj = action.desired if isinstance(action, CreateObject | ApplyObject) else action.live
            logger.warning("%s of %s: %s", type(action).__name__, self.owner.name, error)
            return ApplyFailure(object_id(obj), _condition_for_error(error))

    def invalidate_secrets(self) -> None:
        """Forget which Secrets were created, so that a missing one is created again."""
        for key in [key for key in self.last_applied if key[0] == SECRET]:
            del self.last_applied[key]

    async def _execute(self, action: ObjectAction) -> ApplyFailure | None:
        match action:
            case CreateObject(desired) if kind_of(desired) == SECRET:
                await self._create_secret(desired)
            case CreateObject(desired):
                return await self._create(desired)
            case ApplyObject(desired, live):
                await self._apply(desired, live)
            case ReplaceObject(live) | DeleteObject(live):
                await self._delete(live)
            case NotOwned(live, is_terminating):
                return _not_owned(live, is_terminating=is_terminating)
        return None

    async def _create(self, desired: Object) -> ApplyFailure | None:
        """Apply an object that is not in the cache, unless it exists and is not owned."""
        kind, metadata = kind_of(desired), desired["metadata"]
        existing = await self._api.get(kind, metadata["namespace"], metadata["name"])
        if existing is not None and not self.owner.owns(existing):
            return _not_owned(existing, is_terminating=self.owner.is_from_predecessor(existing))
        await self._apply(desired, existing)
        return None

    async def _create_secret(self, desired: Object) -> None:
        """Create a Secret; an existing one has the same content, as its name contains the hash."""
        try:
            await self._api.create(SECRET, desired)
        except Conflict as error:
            if not error.already_exists:
                raise
        self.last_applied[object_id(desired)] = LastApplied(
            desired_hash(desired), "", self._clock()
        )

    async def _apply(self, desired: Object, live: Object | None) -> None:
        kind, body = kind_of(desired), with_last_applied_hash(desired)
        if live is not None:
            body = {**body, "metadata": {**body["metadata"], "uid": live["metadata"]["uid"]}}
            if last_applied_hash(live) == desired_hash(desired) and kind != JOB:
                # Someone has edited it since. A merge patch also removes entries added to lists.
                await self._api.merge_patch(kind, body)
        result = await self._api.apply(kind, body)
        self._cache.update(kind, result)
        self.last_applied[object_id(desired)] = LastApplied(
            desired_hash(desired), fingerprint(result, desired), self._clock()
        )

    async def _delete(self, live: Object) -> None:
        kind, metadata = kind_of(live), live["metadata"]
        await self._api.delete(kind, metadata["namespace"], metadata["name"], uid=metadata["uid"])
        self.last_applied.pop(object_id(live), None)


def _condition_for_error(error: KubeApiError) -> ConditionState:
    if isinstance(error, Forbidden):
        if "exceeded quota" in str(error):
            return condition_false(
                "QuotaExceeded", f"{error}; raise the namespace's quota or ask for less"
            )
        return condition_false(
            "Forbidden", f"{error}; see the operator's RBAC and the cluster's policies"
        )
    if isinstance(error, Conflict):
        return condition_unknown("Conflict", f"{error}; will be retried")
    return condition_false("ObjectRejected", str(error))


def _not_owned(live: Object, *, is_terminating: bool) -> ApplyFailure:
    key = object_id(live)
    display_name = f"{key[0].name} {live['metadata'].get('namespace')}/{key[1]}"
    if is_terminating:
        text = f"{display_name} belongs to a deleted MoEModel of this name and is still terminating"
        return ApplyFailure(key, condition_unknown("WaitingForDeletion", text))
    text = f"{display_name} already exists and is not owned by this MoEModel: rename one of the two"
    return ApplyFailure(key, condition_false("NotOwned", text))
