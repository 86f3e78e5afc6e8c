"""Cache of the cluster's objects: MoEModels, and everything labelled as managed by the operator.

Three sources write to it: lists and watches (see `informer.py`) and the responses to the operator's
own writes. They can arrive in any order, so for each name the highest resourceVersion wins
(versions of one kind are comparable), and neither a state older than an object's deletion nor one
older than a list that lacks it brings the object back. Objects are shared with all readers and must
not be modified.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.kube.manifests.names import MODEL_LABEL
from faasmoe_operator.kube.types import POD, Kind, Object

MAX_TOMBSTONES = 10_000

ObjectKey = tuple[str, str]  # namespace and name


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """An object was added, modified or deleted.

    Attributes:
        kind: its kind.
        old: its state before; None if it was added.
        new: its state now; None if it was deleted.
    """

    kind: Kind
    old: Object | None
    new: Object | None

    @property
    def object(self) -> Object:
        """The object's last known state."""
        latest = self.new or self.old
        assert latest is not None
        return latest


class ObjectCache:
    """Objects by kind and name, by the uid of their controller, and by the label of a model."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[ObjectKey, Object]] = {}
        self._by_owner = _Index(controller_uid)
        self._by_model = _Index(labelled_model)
        self._tombstones: dict[str, int] = {}  # uid to version of the deletion
        self._list_versions: dict[tuple[Kind, str | None], int] = {}
        self._handlers: list[Callable[[ObjectChange], None]] = []
        self._owner_changes: dict[str, ChangeNotifier] = {}

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """Return an object; None if it is not in the cache."""
        return self._objects.get(kind, {}).get((namespace, name))

    def list_all(self, kind: Kind) -> list[Object]:
        """Return all objects of a kind."""
        return list(self._objects.get(kind, {}).values())

    def owned_by(self, uid: str, kind: Kind | None = None) -> list[Object]:
        """Return the objects, of one kind or all, whose controller has this uid."""
        return self._by_owner.get(uid, kind)

    def labelled_with_model(
        self, namespace: str, name: str, kind: Kind | None = None
    ) -> list[Object]:
        """Return the objects that carry a model's label, whatever their controller."""
        return self._by_model.get((namespace, name), kind)

    def add_event_handler(self, handler: Callable[[ObjectChange], None]) -> None:
        """Call a function with every change, synchronously and in order."""
        self._handlers.append(handler)

    def owner_changes(self, owner_uid: str) -> ChangeNotifier:
        """Return the notifier of changes to the objects that an owner controls."""
        return self._owner_changes.setdefault(owner_uid, ChangeNotifier())

    def update(self, kind: Kind, obj: Object) -> bool:
        """Store an object's state if it is newer; return whether it was."""
        namespace, _ = _object_key(obj)
        return self._update(kind, obj, newer_than=self._list_version(kind, namespace))

    def delete(self, kind: Kind, obj: Object) -> bool:
        """Remove an object, given its last state; return whether it was in the cache.

        An object also counts as deleted when it stops matching the watch's label selector.
        """
        key, uid = _object_key(obj), _uid(obj)
        self._add_tombstone(uid, _resource_version(obj))
        old = self._objects.get(kind, {}).get(key)
        if old is None or _uid(old) != uid:
            return False
        self._store(kind, key, old, None)
        return True

    def replace(
        self,
        kind: Kind,
        objects: Iterable[Object],
        *,
        namespace: str | None,
        resource_version: str,
    ) -> int:
        """Bring the cache to the state of a complete list.

        Objects that the list lacks are deleted unless they are newer than the list: the response to
        a write may have arrived before it.

        Args:
            kind: the kind that was listed.
            objects: all objects of the list.
            namespace: the namespace that was listed; None for all.
            resource_version: the list's resourceVersion.

        Returns:
            How many objects were deleted.
        """
        list_version = int(resource_version)
        listed = {_uid(obj): obj for obj in objects}
        deleted = [
            obj
            for (object_namespace, _), obj in self._objects.get(kind, {}).items()
            if namespace in (None, object_namespace)
            and _uid(obj) not in listed
            and _resource_version(obj) <= list_version
        ]
        for obj in deleted:
            self.delete(kind, obj)
        for obj in listed.values():
            self._update(kind, obj, newer_than=-1)
        self._list_versions[kind, namespace] = list_version
        return len(deleted)

    def forget(self, kind: Kind) -> None:
        """Remove all objects of a kind that is no longer followed; a later list restores them."""
        for key, obj in list(self._objects.get(kind, {}).items()):
            self._store(kind, key, obj, None)
        for listed in [listed for listed in self._list_versions if listed[0] == kind]:
            del self._list_versions[listed]

    def _update(self, kind: Kind, obj: Object, *, newer_than: int) -> bool:
        """Store an object's state if it is newer; `newer_than` applies to unknown objects."""
        key, version = _object_key(obj), _resource_version(obj)
        old = self._objects.get(kind, {}).get(key)
        known_version = newer_than if old is None else _resource_version(old)
        if version <= max(known_version, self._tombstones.get(_uid(obj), -1)):
            return False
        self._store(kind, key, old, _without_managed_fields(obj))
        return True

    def _list_version(self, kind: Kind, namespace: str) -> int:
        """Return the version of the last list that covered a namespace; -1 if there was none."""
        scopes = (kind, namespace), (kind, None)
        return max(self._list_versions.get(scope, -1) for scope in scopes)

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
        for handler in self._handlers:
            handler(change)
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
    """Objects by a key computed from each; objects whose key is None are left out."""

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
    """The pods that one object controls.

    Args:
        cache: the cache that holds them.
        owner_uid: uid of the controlling object.
    """

    def __init__(self, cache: ObjectCache, owner_uid: str) -> None:
        self._cache = cache
        self._owner_uid = owner_uid

    def list_oldest_first(self) -> list[Object]:
        """Return the pods, oldest first."""
        return sorted(self._cache.owned_by(self._owner_uid, POD), key=_creation_order)

    def get(self, namespace: str, name: str) -> Object | None:
        """Return a pod; None if it does not exist or another object controls it."""
        pod = self._cache.get(POD, namespace, name)
        return pod if pod is not None and controller_uid(pod) == self._owner_uid else None

    def update(self, pod: Object) -> None:
        """Store the response to a write, which can arrive before the watch event."""
        self._cache.update(POD, pod)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is evaluated at each change of these pods."""
        await self._cache.owner_changes(self._owner_uid).wait_for(condition)


def controller_uid(obj: Mapping[str, Any]) -> str | None:
    """Return the uid of an object's controller; None if it has none."""
    for reference in obj["metadata"].get("ownerReferences", ()):
        if reference.get("controller"):
            uid: str = reference["uid"]
            return uid
    return None


def labelled_model(obj: Mapping[str, Any]) -> ObjectKey | None:
    """Return namespace and name of the model in an object's label; None without the label."""
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
    """Drop managedFields: nothing here reads them, and they are a third of an object."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return {**obj, "metadata": metadata}
