"""Carries out what was planned: the only place that writes the objects of models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from faasmoe_operator.kube.actions import (
    Action,
    Applied,
    Apply,
    Create,
    Delete,
    NameClash,
    ObjectId,
    Replace,
    object_id,
)
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import ApiError, Conflict, Forbidden, Unavailable
from faasmoe_operator.kube.intent import applied_hash, fingerprint, intent_hash, stamped
from faasmoe_operator.kube.kinds import JOB, SECRET, Object, kind_of
from faasmoe_operator.kube.ownership import Owner
from faasmoe_operator.kube.verdict import Verdict, bad, pending

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """An object that could not be made as wanted.

    Attributes:
        object_id: which.
        verdict: what that means for the part of the model that it belongs to.
    """

    object_id: ObjectId
    verdict: Verdict


class Writer:
    """Carries out actions on one model's objects, and remembers what was applied.

    Args:
        api: the API server.
        cache: takes its answers, so that a later plan knows what this one did.
        owner: the model.
        clock: a clock that only goes forward.
    """

    def __init__(
        self, api: KubeApi, cache: ObjectCache, owner: Owner, *, clock: Callable[[], float]
    ) -> None:
        self.owner = owner
        self.applied: dict[ObjectId, Applied] = {}
        self._api, self._cache, self._clock = api, cache, clock

    async def carry_out(self, action: Action) -> Problem | None:
        """Carry out an action; what the API refuses is returned; raises Unavailable."""
        try:
            return await self._carry_out(action)
        except Unavailable:
            raise
        except ApiError as error:
            obj = action.wanted if isinstance(action, Create | Apply) else action.live
            logger.warning("%s of %s: %s", type(action).__name__, self.owner.name, error)
            return Problem(object_id(obj), _refused(error))

    def forget_secrets(self) -> None:
        """Have secrets created again: a pod says that one is missing."""
        for name in [name for name in self.applied if name[0] == SECRET]:
            del self.applied[name]

    async def _carry_out(self, action: Action) -> Problem | None:
        match action:
            case Create(wanted) if kind_of(wanted) == SECRET:
                await self._create_secret(wanted)
            case Create(wanted):
                return await self._create(wanted)
            case Apply(wanted, live):
                await self._apply(wanted, live)
            case Replace(live) | Delete(live):
                await self._delete(live)
            case NameClash(live, going):
                return _clash(live, going=going)
        return None

    async def _create(self, wanted: Object) -> Problem | None:
        """Apply an object that the cache does not have, unless it is there and another's."""
        kind, metadata = kind_of(wanted), wanted["metadata"]
        found = await self._api.get(kind, metadata["namespace"], metadata["name"])
        if found is not None and not self.owner.owns(found):
            return _clash(found, going=self.owner.preceded(found))
        await self._apply(wanted, found)
        return None

    async def _create_secret(self, wanted: Object) -> None:
        """Create a secret; one that is there has the same content, as its name is a hash of it."""
        try:
            await self._api.create(SECRET, wanted)
        except Conflict as error:
            if not error.exists:
                raise
        self.applied[object_id(wanted)] = Applied(intent_hash(wanted), "", self._clock())

    async def _apply(self, wanted: Object, live: Object | None) -> None:
        kind, body = kind_of(wanted), stamped(wanted)
        if live is not None:
            body = {**body, "metadata": {**body["metadata"], "uid": live["metadata"]["uid"]}}
            if applied_hash(live) == intent_hash(wanted) and kind != JOB:
                # Somebody has edited it since: entries that were added to lists go too.
                await self._api.merge(kind, body)
        result = await self._api.apply(kind, body)
        self._cache.put(kind, result)
        self.applied[object_id(wanted)] = Applied(
            intent_hash(wanted), fingerprint(result, wanted), self._clock()
        )

    async def _delete(self, live: Object) -> None:
        kind, metadata = kind_of(live), live["metadata"]
        await self._api.delete(kind, metadata["namespace"], metadata["name"], uid=metadata["uid"])
        self.applied.pop(object_id(live), None)


def _refused(error: ApiError) -> Verdict:
    if isinstance(error, Forbidden):
        if "exceeded quota" in str(error):
            return bad("QuotaExceeded", f"{error}; raise the namespace's quota or ask for less")
        return bad("Forbidden", f"{error}; see the operator's RBAC and the cluster's policies")
    if isinstance(error, Conflict):
        return pending("Conflict", f"{error}; it is tried again")
    return bad("ObjectRefused", str(error))


def _clash(live: Object, *, going: bool) -> Problem:
    name = object_id(live)
    called = f"{name[0].name} {live['metadata'].get('namespace')}/{name[1]}"
    if going:
        text = f"{called} is of the MoEModel of this name that was deleted, and not gone yet"
        return Problem(name, pending("WaitingForDeletion", text))
    text = f"{called} exists and is not this MoEModel's; it is left alone: rename one of the two"
    return Problem(name, bad("NameTaken", text))
