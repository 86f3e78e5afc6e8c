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

from faasmoe_operator.kube.manifests.names import MODEL_LABEL
from faasmoe_operator.kube.types import POD, Kind, Object
from faasmoe_operator.platforms.registry import ChangeNotifier

MAX_TOMBSTONES = 10_000

ObjectKey = tuple[str, str]  # namespace and name


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """An object came, changed or went.

    Attributes:
        kind: its kind.
        before: what it was; None if it came.
        after: what it is; None if it went.
    """

    kind: Kind
    old: Object | None
    new: Object | None

    @property
    def object(self) -> Object:
        """Its last known state."""
        latest = self.new or self.old
        assert latest is not None
        return latest


class ObjectCache:
    """Objects by kind, namespace and name, by the uid of what controls them, and by model."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[ObjectKey, Object]] = {}
        self._by_owner = _Index(controller_uid)
        self._by_model = _Index(labelled_model)
        self._tombstones: dict[str, int] = {}
        self._handlers: list[Callable[[ObjectChange], None]] = []
        self._owner_changes: dict[str, ChangeNotifier] = {}

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """Return an object, or None if there is none."""
        return self._objects.get(kind, {}).get((namespace, name))

    def list_all(self, kind: Kind) -> list[Object]:
        """Return all objects of a kind."""
        return list(self._objects.get(kind, {}).values())

    def owned_by(self, uid: str, kind: Kind | None = None) -> list[Object]:
        """Return the objects that the object of this uid controls, of one kind or of all."""
        return self._by_owner.get(uid, kind)

    def labelled_with_model(
        self, namespace: str, name: str, kind: Kind | None = None
    ) -> list[Object]:
        """Return the objects that carry a model's label, whoever controls them."""
        return self._by_model.get((namespace, name), kind)

    def add_event_handler(self, handler: Callable[[ObjectChange], None]) -> None:
        """Have a function called with each change, at once and in order."""
        self._handlers.append(handler)

    def owner_changes(self, owner_uid: str) -> ChangeNotifier:
        """Return what wakes those who wait for a change of an owner's objects."""
        return self._owner_changes.setdefault(owner_uid, ChangeNotifier())

    def update(self, kind: Kind, obj: Object) -> bool:
        """Take an object's state; return whether it is news."""
        key, version = _object_key(obj), _resource_version(obj)
        old = self._objects.get(kind, {}).get(key)
        known_version = -1 if old is None else _resource_version(old)
        if version <= max(known_version, self._tombstones.get(_uid(obj), -1)):
            return False
        self._store(kind, key, old, _without_managed_fields(obj))
        return True

    def delete(self, kind: Kind, obj: Object) -> bool:
        """Take that an object is gone, or not ours to see any more; return whether it is news."""
        key, uid = _object_key(obj), _uid(obj)
        self._add_tombstone(uid, _resource_version(obj))
        old = self._objects.get(kind, {}).get(key)
        if old is None or _uid(old) != uid:
            return False
        self._store(kind, key, old, None)
        return True

    def known_uids(self, kind: Kind, namespace: str | None) -> frozenset[str]:
        """Return the uids of a kind's objects in a namespace, or in all; for `replace`."""
        objects = self._objects.get(kind, {}).items()
        return frozenset(_uid(obj) for (of, _), obj in objects if namespace in (None, of))

    def replace(self, kind: Kind, objects: Iterable[Object], *, known_uids: frozenset[str]) -> int:
        """Take a complete list; return how many objects it showed to be gone.

        Args:
            kind: the kind that was listed.
            listed: what there is.
            known: what `known` gave before the list was asked for: what came since is not gone
                because the list lacks it.
        """
        listed_by_uid = {_uid(obj): obj for obj in objects}
        deleted = [
            obj
            for obj in self.list_all(kind)
            if _uid(obj) in known_uids and _uid(obj) not in listed_by_uid
        ]
        for obj in deleted:
            self.delete(kind, obj)
        for obj in listed_by_uid.values():
            self.update(kind, obj)
        return len(deleted)

    def _store(self, kind: Kind, key: ObjectKey, old: Object | None, new: Object | None) -> None:
        objects = self._objects.setdefault(kind, {})
        if old is not None:
            del objects[key]
        if new is not None:
            objects[key] = new
        for index in (self._by_owner, self._by_model):
            index.update(kind, key, old=old, new=new)
        self._notify_handlers(ObjectChange(kind, old, new))

    def _notify_handlers(self, change: ObjectChange) -> None:
        for listener in self._handlers:
            listener(change)
        owners = {controller_uid(obj) for obj in (change.old, change.new) if obj is not None}
        for owner in owners:
            if owner is not None and owner in self._owner_changes:
                self._owner_changes[owner].notify()

    def _add_tombstone(self, uid: str, version: int) -> None:
        self._tombstones[uid] = version
        while len(self._tombstones) > MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        self._owner_changes.pop(uid, None)


class _Index:
    """Objects by something that is read from each."""

    def __init__(self, index_func: Callable[[Object], Hashable | None]) -> None:
        self._index_func = index_func
        self._objects: dict[Hashable, dict[tuple[Kind, ObjectKey], Object]] = {}

    def get(self, key: Hashable, kind: Kind | None) -> list[Object]:
        objects = self._objects.get(key, {})
        return [obj for (of, _), obj in objects.items() if kind is None or of == kind]

    def update(
        self, kind: Kind, object_key: ObjectKey, *, old: Object | None, new: Object | None
    ) -> None:
        if old is not None and (key := self._index_func(old)) is not None:
            objects = self._objects[key]
            del objects[kind, object_key]
            if not objects:
                del self._objects[key]
        if new is not None and (key := self._index_func(new)) is not None:
            self._objects.setdefault(key, {})[kind, object_key] = new


class OwnedPods:
    """The pods that one object controls, for its control core.

    Args:
        cache: where they are.
        owner_uid: the uid of the object.
    """

    def __init__(self, cache: ObjectCache, owner_uid: str) -> None:
        self._cache = cache
        self._owner_uid = owner_uid

    def list_oldest_first(self) -> list[Object]:
        """Return the pods, oldest first."""
        return sorted(self._cache.owned_by(self._owner_uid, POD), key=_creation_order)

    def get(self, namespace: str, name: str) -> Object | None:
        """Return a pod of that name, or None if there is none or it is another's."""
        pod = self._cache.get(POD, namespace, name)
        return pod if pod is not None and controller_uid(pod) == self._owner_uid else None

    def update(self, pod: Object) -> None:
        """Take the API's answer to a write of ours, which the watch may tell only later."""
        self._cache.update(POD, pod)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at at each change of these pods."""
        await self._cache.owner_changes(self._owner_uid).wait_for(condition)


def controller_uid(obj: Mapping[str, Any]) -> str | None:
    """Return the uid of the object that controls this one, if one does."""
    for reference in obj["metadata"].get("ownerReferences", ()):
        if reference.get("controller"):
            uid: str = reference["uid"]
            return uid
    return None


def labelled_model(obj: Mapping[str, Any]) -> ObjectKey | None:
    """Return the namespace and name of the model whose label an object carries."""
    metadata = obj["metadata"]
    name = metadata.get("labels", {}).get(MODEL_LABEL)
    return None if name is None else (metadata.get("namespace", ""), name)


def _object_key(obj: Object) -> ObjectKey:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _uid(obj: Object) -> str:
    uid: str = obj["metadata"]["uid"]
    return uid


def _resource_version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


def _creation_order(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("creationTimestamp", ""), obj["metadata"]["name"]


def _without_managed_fields(obj: Object) -> Object:
    """Leave out managedFields: nobody here reads them, and they are a third of an object."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return {**obj, "metadata": metadata}
