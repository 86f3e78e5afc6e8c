"""An in-memory API server with server-side apply, uids and ownership.

It implements the interface of the operator's client, without HTTP.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.errors import Conflict, KubeApiError, NotFound
from faasmoe_operator.kube.types import POD, Kind, Object, kind_of

ObjectKey = tuple[Kind, str, str]


class FakeKubeApi:
    """Stores objects, updates a cache immediately and records the requests.

    Attributes:
        objects: all objects.
        requests: verb, kind and name of each request in order.
        errors: errors to raise for a verb and kind.
    """

    def __init__(self, cache: ObjectCache | None = None) -> None:
        self.objects: dict[ObjectKey, Object] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.errors: dict[tuple[str, Kind], KubeApiError] = {}
        self._cache = cache
        self._applied: dict[ObjectKey, Object] = {}
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        self._record_request("get", kind, name)
        return copy.deepcopy(self.objects.get((kind, namespace or "", name)))

    async def create(self, kind: Kind, obj: Object) -> Object:
        name = _object_key(kind, obj)
        self._record_request("create", kind, name[2])
        if name in self.objects:
            raise Conflict(f"{name[2]} exists", status=409, reason="AlreadyExists")
        return self._store_object(name, copy.deepcopy(obj))

    async def apply(self, kind: Kind, obj: Object) -> Object:
        name = _object_key(kind, obj)
        self._record_request("apply", kind, name[2])
        before = self.objects.get(name)
        uid = obj["metadata"].get("uid")
        if uid is not None and (before is None or before["metadata"]["uid"] != uid):
            raise Conflict(f"{name[2]}: another uid", status=409, reason="Conflict")
        version = obj["metadata"].get("resourceVersion")
        if version is not None and (
            before is None or before["metadata"]["resourceVersion"] != version
        ):
            raise Conflict(f"{name[2]}: changed since", status=409, reason="Conflict")
        merged = _server_side_apply(before or {}, obj, owned=self._applied.get(name, {}))
        self._applied[name] = copy.deepcopy(obj)
        for condition in ("uid", "resourceVersion"):
            self._applied[name]["metadata"].pop(condition, None)
        if before is not None and merged == before:
            return copy.deepcopy(before)
        return self._store_object(name, merged)

    async def merge_patch(self, kind: Kind, obj: Object) -> Object:
        name = _object_key(kind, obj)
        self._record_request("merge", kind, name[2])
        before = self.objects.get(name)
        if before is None or obj["metadata"].get("uid") not in (None, before["metadata"]["uid"]):
            raise Conflict(f"{name[2]}: another uid", status=409, reason="Conflict")
        fields = {key: value for key, value in obj.items() if key not in ("metadata", "status")}
        return self._store_object(name, _merge_patch(before, fields))

    async def patch_status(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        status: Object,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> Object:
        self._record_request("patch_status", kind, name)
        before = self.objects.get((kind, namespace, name))
        if before is None:
            raise NotFound(f"{name} is gone", status=404, reason="NotFound")
        if uid not in (None, before["metadata"]["uid"]):
            raise Conflict(f"{name}: another uid", status=409, reason="Conflict")
        return self._store_object(
            (kind, namespace, name), {**before, "status": copy.deepcopy(status)}
        )

    async def patch_metadata(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        labels: Mapping[str, str | None] | None = None,
        annotations: Mapping[str, str | None] | None = None,
    ) -> Object:
        self._record_request("patch", kind, name)
        before = self.objects.get((kind, namespace, name))
        if before is None:
            raise NotFound(f"{name} is gone", status=404, reason="NotFound")
        after = copy.deepcopy(before)
        for field, values in (("labels", labels), ("annotations", annotations)):
            entries = {**after["metadata"].get(field, {}), **(values or {})}
            after["metadata"][field] = {k: v for k, v in entries.items() if v is not None}
        return self._store_object((kind, namespace, name), after)

    async def resize_pod(
        self, namespace: str, name: str, *, container: str, requests: Mapping[str, str]
    ) -> Object:
        self._record_request("resize", POD, name)
        before = self.objects.get((POD, namespace, name))
        if before is None:
            raise NotFound(f"{name} is gone", status=404, reason="NotFound")
        after = copy.deepcopy(before)
        (resized,) = (c for c in after["spec"]["containers"] if c["name"] == container)
        resized["resources"]["requests"].update(requests)
        return self._store_object((POD, namespace, name), after)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> None:
        self._record_request("delete", kind, name)
        obj = self.objects.get((kind, namespace, name))
        if obj is None or uid not in (None, obj["metadata"]["uid"]):
            return
        self.remove(kind, namespace, name)

    def write(self, obj: Object) -> Object:
        """Write an object as another client, such as a controller or a user."""
        obj = copy.deepcopy(obj)
        name = _object_key(kind_of(obj), obj)
        before = self.objects.get(name)
        if before is not None:
            obj["metadata"]["uid"] = before["metadata"]["uid"]
        return self._store_object(name, obj)

    def set_status(self, kind: Kind, namespace: str, name: str, **status: Any) -> None:
        """Write the status of an object as its controller would."""
        obj = self.objects[kind, namespace, name]
        self._store_object((kind, namespace, name), {**obj, "status": status})

    def remove(self, kind: Kind, namespace: str, name: str) -> None:
        """Remove an object and the objects that it controls."""
        obj = self.objects.pop((kind, namespace, name))
        self._applied.pop((kind, namespace, name), None)
        obj["metadata"]["resourceVersion"] = str(next(self._versions))
        if self._cache is not None and kind.name != "Secret":
            self._cache.delete(kind, obj)
        uid = obj["metadata"]["uid"]
        for child_kind, child_namespace, child_name in [
            key for key, other in self.objects.items() if controller_uid(other) == uid
        ]:
            self.remove(child_kind, child_namespace, child_name)

    def writes(self) -> Sequence[tuple[str, str, str]]:
        """Return all write requests and clear the record of requests."""
        writes = [request for request in self.requests if request[0] != "get"]
        self.requests.clear()
        return writes

    def _record_request(self, verb: str, kind: Kind, name: str) -> None:
        self.requests.append((verb, kind.name, name))
        if (error := self.errors.get((verb, kind))) is not None:
            raise error

    def _store_object(self, name: ObjectKey, obj: Object) -> Object:
        before = self.objects.get(name)
        metadata = {"generation": 1, "creationTimestamp": "2026-09-01T12:00:00Z", **obj["metadata"]}
        metadata.setdefault("uid", f"uid-{next(self._uids)}")
        metadata["resourceVersion"] = str(next(self._versions))
        if before is not None and before.get("spec") != obj.get("spec"):
            metadata["generation"] = before["metadata"]["generation"] + 1
        self.objects[name] = {**obj, "metadata": metadata}
        if self._cache is not None and name[0].name not in ("Secret", "Event"):
            self._cache.update(name[0], copy.deepcopy(self.objects[name]))
        return copy.deepcopy(self.objects[name])


def _object_key(kind: Kind, obj: Object) -> ObjectKey:
    return kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _server_side_apply(live: Any, wanted: Any, *, owned: Any) -> Any:
    """Merge as server-side apply does: fields that were owned and are now absent are removed."""
    if isinstance(live, list) and isinstance(wanted, list):
        return [*copy.deepcopy(wanted), *_entries_of_others(live, wanted, owned)]
    if not isinstance(live, dict) or not isinstance(wanted, dict):
        return copy.deepcopy(wanted)
    owned = owned if isinstance(owned, dict) else {}
    retained = {key: value for key, value in live.items() if key in wanted or key not in owned}
    changed = {
        key: _server_side_apply(live.get(key), value, owned=owned.get(key))
        for key, value in wanted.items()
    }
    return {**copy.deepcopy(retained), **changed}


def _entries_of_others(live: list[Any], wanted: list[Any], owned: Any) -> list[Any]:
    """Return the entries that others added to a keyed list, such as the ports of a Service."""
    ours = [entry.get("port") for entry in (*wanted, *(owned or ())) if isinstance(entry, dict)]
    return [e for e in live if isinstance(e, dict) and e.get("port", ours) not in (ours, *ours)]


def _merge_patch(live: Any, change: Any) -> Any:
    """Merge as a JSON merge patch does: lists are replaced."""
    if not isinstance(live, dict) or not isinstance(change, dict):
        return copy.deepcopy(change)
    return {**copy.deepcopy(live), **{k: _merge_patch(live.get(k), v) for k, v in change.items()}}
