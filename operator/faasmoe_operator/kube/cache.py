"""What the API server has told us: the newest state of every object that is ours, and of MoEModels.

Watch events come from several streams, answers to our own writes come beside them, and lists come
now and then to catch deletions that a broken stream has missed. They may overtake each other, so
the newest resourceVersion of a name wins (versions of one kind are ordered), and nothing older than
its deletion brings an object back. Objects in here are shared: nobody changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.kube.kinds import POD, Kind, Object
from faasmoe_operator.kube.manifests.names import MODEL_LABEL
from faasmoe_operator.platforms.roster import Change

MAX_TOMBSTONES = 10_000

Place = tuple[str, str]  # namespace and name


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """An object came, changed or went.

    Attributes:
        kind: its kind.
        before: what it was; None if it came.
        after: what it is; None if it went.
    """

    kind: Kind
    before: Object | None
    after: Object | None

    @property
    def object(self) -> Object:
        """Its last known state."""
        known = self.after or self.before
        assert known is not None
        return known


class ObjectCache:
    """Objects by kind, namespace and name, by the uid of what controls them, and by model."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Place, Object]] = {}
        self._owned = _Index(controller_uid)
        self._labelled = _Index(model_of)
        self._tombstones: dict[str, int] = {}
        self._listeners: list[Callable[[ObjectChange], None]] = []
        self._changes: dict[str, Change] = {}

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """Return an object, or None if there is none."""
        return self._objects.get(kind, {}).get((namespace, name))

    def all(self, kind: Kind) -> list[Object]:
        """Return all objects of a kind."""
        return list(self._objects.get(kind, {}).values())

    def owned(self, uid: str, kind: Kind | None = None) -> list[Object]:
        """Return the objects that the object of this uid controls, of one kind or of all."""
        return self._owned.get(uid, kind)

    def of_model(self, namespace: str, name: str, kind: Kind | None = None) -> list[Object]:
        """Return the objects that carry a model's label, whoever controls them."""
        return self._labelled.get((namespace, name), kind)

    def subscribe(self, listener: Callable[[ObjectChange], None]) -> None:
        """Have a function called with each change, at once and in order."""
        self._listeners.append(listener)

    def change_of(self, owner_uid: str) -> Change:
        """Return what wakes those who wait for a change of an owner's objects."""
        return self._changes.setdefault(owner_uid, Change())

    def put(self, kind: Kind, obj: Object) -> bool:
        """Take an object's state; return whether it is news."""
        place, version = _place(obj), _version(obj)
        before = self._objects.get(kind, {}).get(place)
        known = -1 if before is None else _version(before)
        if version <= max(known, self._tombstones.get(_uid(obj), -1)):
            return False
        self._set(kind, place, before, _slim(obj))
        return True

    def remove(self, kind: Kind, obj: Object) -> bool:
        """Take that an object is gone, or not ours to see any more; return whether it is news."""
        place, uid = _place(obj), _uid(obj)
        self._bury(uid, _version(obj))
        before = self._objects.get(kind, {}).get(place)
        if before is None or _uid(before) != uid:
            return False
        self._set(kind, place, before, None)
        return True

    def known(self, kind: Kind, namespace: str | None) -> frozenset[str]:
        """Return the uids of a kind's objects in a namespace, or in all; for `replace`."""
        objects = self._objects.get(kind, {}).items()
        return frozenset(_uid(obj) for (of, _), obj in objects if namespace in (None, of))

    def replace(self, kind: Kind, listed: Iterable[Object], *, known: frozenset[str]) -> int:
        """Take a complete list; return how many objects it showed to be gone.

        Args:
            kind: the kind that was listed.
            listed: what there is.
            known: what `known` gave before the list was asked for: what came since is not gone
                because the list lacks it.
        """
        there = {_uid(obj): obj for obj in listed}
        gone = [obj for obj in self.all(kind) if _uid(obj) in known and _uid(obj) not in there]
        for obj in gone:
            self.remove(kind, obj)
        for obj in there.values():
            self.put(kind, obj)
        return len(gone)

    def _set(self, kind: Kind, place: Place, before: Object | None, after: Object | None) -> None:
        objects = self._objects.setdefault(kind, {})
        if before is not None:
            del objects[place]
        if after is not None:
            objects[place] = after
        for index in (self._owned, self._labelled):
            index.change(kind, place, before=before, after=after)
        self._tell(ObjectChange(kind, before, after))

    def _tell(self, change: ObjectChange) -> None:
        for listener in self._listeners:
            listener(change)
        owners = {controller_uid(obj) for obj in (change.before, change.after) if obj is not None}
        for owner in owners:
            if owner is not None and owner in self._changes:
                self._changes[owner].notify()

    def _bury(self, uid: str, version: int) -> None:
        self._tombstones[uid] = version
        while len(self._tombstones) > MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        self._changes.pop(uid, None)


class _Index:
    """Objects by something that is read from each."""

    def __init__(self, key: Callable[[Object], Hashable | None]) -> None:
        self._key = key
        self._objects: dict[Hashable, dict[tuple[Kind, Place], Object]] = {}

    def get(self, key: Hashable, kind: Kind | None) -> list[Object]:
        objects = self._objects.get(key, {})
        return [obj for (of, _), obj in objects.items() if kind is None or of == kind]

    def change(
        self, kind: Kind, place: Place, *, before: Object | None, after: Object | None
    ) -> None:
        if before is not None and (key := self._key(before)) is not None:
            objects = self._objects[key]
            del objects[kind, place]
            if not objects:
                del self._objects[key]
        if after is not None and (key := self._key(after)) is not None:
            self._objects.setdefault(key, {})[kind, place] = after


class PodSource:
    """The pods that one object controls, for its control core.

    Args:
        cache: where they are.
        owner_uid: the uid of the object.
    """

    def __init__(self, cache: ObjectCache, owner_uid: str) -> None:
        self._cache = cache
        self._owner_uid = owner_uid

    def pods(self) -> list[Object]:
        """Return the pods, oldest first."""
        return sorted(self._cache.owned(self._owner_uid, POD), key=_age)

    def get(self, namespace: str, name: str) -> Object | None:
        """Return a pod of that name, or None if there is none or it is another's."""
        pod = self._cache.get(POD, namespace, name)
        return pod if pod is not None and controller_uid(pod) == self._owner_uid else None

    def put(self, pod: Object) -> None:
        """Take the API's answer to a write of ours, which the watch may tell only later."""
        self._cache.put(POD, pod)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at at each change of these pods."""
        await self._cache.change_of(self._owner_uid).wait_for(condition)


def controller_uid(obj: Mapping[str, Any]) -> str | None:
    """Return the uid of the object that controls this one, if one does."""
    for reference in obj["metadata"].get("ownerReferences", ()):
        if reference.get("controller"):
            uid: str = reference["uid"]
            return uid
    return None


def model_of(obj: Mapping[str, Any]) -> Place | None:
    """Return the namespace and name of the model whose label an object carries."""
    metadata = obj["metadata"]
    name = metadata.get("labels", {}).get(MODEL_LABEL)
    return None if name is None else (metadata.get("namespace", ""), name)


def _place(obj: Object) -> Place:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _uid(obj: Object) -> str:
    uid: str = obj["metadata"]["uid"]
    return uid


def _version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


def _age(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("creationTimestamp", ""), obj["metadata"]["name"]


def _slim(obj: Object) -> Object:
    """Leave out managedFields: nobody here reads them, and they are a third of an object."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return {**obj, "metadata": metadata}
