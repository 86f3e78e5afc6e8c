"""Client of the Kubernetes API: verbs on objects as plain JSON dicts.

Paths are built from the static kinds in `types.py`. The library's `DynamicClient` is not used: it
discovers every API group before its first request (about 30 requests), caches the result in a file
under /tmp, which a read-only container does not have, wraps every response in objects, and cannot
pass `fieldValidation`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol, Self
from urllib.parse import quote

from faasmoe_operator.kube.errors import Conflict, KubeApiError, NotFound, error_from_status
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER
from faasmoe_operator.kube.transport import KubeTransport
from faasmoe_operator.kube.types import (
    POD,
    POD_RESIZE,
    Kind,
    Object,
    ObjectList,
    WatchEvent,
)

PAGE_SIZE = 100
"""Objects in a page of a list.

`json.loads` holds the GIL, so that not even a thread parses a large response beside the event loop.
Parsing 100 pods took 10 to 20 ms, 500 took 70 ms; activation requests share the loop and wait.
"""
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"


class KubeApi(Protocol):
    """Requests on single objects. Every method raises KubeApiError; see `errors.py`."""

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return an object; None if it does not exist."""
        ...

    async def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object; raises Conflict with `already_exists` if the name is in use."""
        ...

    async def apply(self, kind: Kind, obj: Object) -> Object:
        """Set the given fields of an object, creating it if needed (forced server-side apply).

        A uid or resourceVersion in its metadata is a precondition; raises Conflict if it fails.
        """
        ...

    async def merge_patch(self, kind: Kind, obj: Object) -> Object:
        """Set the given fields other than metadata and status; lists are replaced.

        Server-side apply retains list entries of other field managers, a merge patch does not.
        A uid in its metadata is a precondition; raises Conflict if it fails.
        """
        ...

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
        """Apply an object's status; raises NotFound if the object does not exist.

        Args:
            kind: the object's kind.
            namespace: the object's namespace.
            name: the object's name.
            status: the complete status; fields applied earlier and absent now are removed.
            uid: precondition; raises Conflict if the object has another uid.
            resource_version: precondition; raises Conflict if the object has changed since.
        """
        ...

    async def patch_metadata(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        labels: Mapping[str, str | None] | None = None,
        annotations: Mapping[str, str | None] | None = None,
    ) -> Object:
        """Set labels and annotations, removing those that are None; raises NotFound."""
        ...

    async def resize_pod(
        self, namespace: str, name: str, *, container: str, requests: Mapping[str, str]
    ) -> Object:
        """Set requests of a container of a running pod; raises NotFound.

        The cluster must serve POD_RESIZE. The QoS class of the pod must not change.
        """
        ...

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> None:
        """Start the deletion of an object; no error if it, or the one of this uid, is gone."""
        ...


class ListWatcher(Protocol):
    """Lists and watches the objects of a kind. Both methods raise KubeApiError."""

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> ObjectList:
        """Return the objects of a namespace, or of all namespaces for None."""
        ...

    def watch(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_s: int,
        idle_timeout_s: float,
    ) -> AsyncGenerator[WatchEvent]:
        """Yield what changed after a resourceVersion until the server ends the watch.

        Close the generator to close the connection.

        Args:
            kind: the kind to watch.
            namespace: the namespace; None for all.
            resource_version: the version to start after.
            label_selector: label selector of the objects; empty for all.
            timeout_s: the server ends the watch after this time, in seconds.
            idle_timeout_s: longest time without an event, in seconds; raises Unavailable.

        Raises:
            Expired: the version is older than the server's history.
            KubeApiError: another error, as response or as an event of the stream.
        """
        ...


class KubeClient:
    """KubeApi and ListWatcher over HTTP; an async context manager.

    Args:
        transport: sends the requests; closed with the client.
    """

    def __init__(self, transport: KubeTransport) -> None:
        self._transport = transport
        self._request = transport.request

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._transport.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return an object; None if it does not exist."""
        try:
            return await self._request("get", kind, _resource_path(kind, namespace, name))
        except NotFound:
            return None

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> ObjectList:
        """Return the objects of a namespace, or of all namespaces for None, read in pages.

        All pages show the state at the resourceVersion of the first one.
        """
        query = {"limit": str(PAGE_SIZE)} | _selector_query(label_selector)
        type_meta = {"apiVersion": kind.api_version, "kind": kind.name}
        objects: list[Object] = []
        while True:
            page = await self._request("list", kind, _resource_path(kind, namespace), query=query)
            # Unlike single objects, the items of a list carry neither apiVersion nor kind.
            objects += [{**type_meta, **item} for item in page.get("items") or ()]
            metadata = page.get("metadata", {})
            if not (continue_token := metadata.get("continue")):
                return ObjectList(objects, metadata.get("resourceVersion", ""))
            query["continue"] = continue_token

    async def watch(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_s: int,
        idle_timeout_s: float,
    ) -> AsyncGenerator[WatchEvent]:
        """Yield what changed after a resourceVersion; see ListWatcher.

        The server sends a bookmark about once a minute when nothing changes, so that the version
        to resume from stays recent.
        """
        path = _resource_path(kind, namespace)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
        } | _selector_query(label_selector)
        lines = self._transport.stream_lines(
            "watch", kind, path, query=query, idle_timeout_s=idle_timeout_s
        )
        async with aclosing(lines):
            async for line in lines:
                if line.strip():
                    yield _decode_watch_event(f"watch {path}", line)

    async def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object; raises Conflict with `already_exists` if the name is in use."""
        path = _resource_path(kind, obj["metadata"].get("namespace"))
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return await self._request("create", kind, path, query=query, body=obj)

    async def apply(self, kind: Kind, obj: Object) -> Object:
        """Set the given fields of an object, creating it if needed (forced server-side apply)."""
        path = _resource_path(kind, obj["metadata"].get("namespace"), obj["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        return await self._request("apply", kind, path, query=query, body=obj, content=APPLY_PATCH)

    async def merge_patch(self, kind: Kind, obj: Object) -> Object:
        """Set the given fields other than metadata and status; lists are replaced."""
        metadata = obj["metadata"]
        body = {key: value for key, value in obj.items() if key not in ("metadata", "status")}
        if "uid" in metadata:
            body["metadata"] = {"uid": metadata["uid"]}
        path = _resource_path(kind, metadata["namespace"], metadata["name"])
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return await self._request("patch", kind, path, query=query, body=body, content=MERGE_PATCH)

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
        """Apply an object's status; raises NotFound if the object does not exist.

        Field validation is not strict: an older CRD drops fields that it does not know, and a
        partial status is better than none.
        """
        metadata = {"name": name, "namespace": namespace}
        if uid is not None:
            metadata["uid"] = uid
        if resource_version is not None:
            metadata["resourceVersion"] = resource_version
        type_meta = {"apiVersion": kind.api_version, "kind": kind.name}
        path = _resource_path(kind, namespace, name) + "/status"
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        body = {**type_meta, "metadata": metadata, "status": status}
        return await self._request(
            "patch_status", kind, path, query=query, body=body, content=APPLY_PATCH
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
        """Set labels and annotations, removing those that are None; raises NotFound."""
        metadata = {"labels": dict(labels or {}), "annotations": dict(annotations or {})}
        body = {"metadata": {field: values for field, values in metadata.items() if values}}
        query = {"fieldManager": FIELD_MANAGER}
        path = _resource_path(kind, namespace, name)
        return await self._request("patch", kind, path, query=query, body=body, content=MERGE_PATCH)

    async def resize_pod(
        self, namespace: str, name: str, *, container: str, requests: Mapping[str, str]
    ) -> Object:
        """Set requests of a container of a running pod; raises NotFound."""
        resized = {"name": container, "resources": {"requests": dict(requests)}}
        path = _resource_path(POD, namespace, name) + "/resize"
        query = {"fieldManager": FIELD_MANAGER}
        body = {"spec": {"containers": [resized]}}
        return await self._request(
            "resize", POD_RESIZE, path, query=query, body=body, content=STRATEGIC_MERGE_PATCH
        )

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> None:
        """Start the deletion of an object; no error if it, or the one of this uid, is gone."""
        body: Object = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            await self._request("delete", kind, _resource_path(kind, namespace, name), body=body)
        except NotFound:
            return
        except Conflict:
            if uid is None:
                raise

    async def is_served(self, kind: Kind) -> bool:
        """Return whether the cluster serves a kind."""
        try:
            resource_list = await self._request("discover", kind, _api_path(kind))
        except NotFound:
            return False
        return any(
            resource.get("name") == kind.plural for resource in resource_list.get("resources", [])
        )


def _api_path(kind: Kind) -> str:
    return f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.api_version}"


def _resource_path(kind: Kind, namespace: str | None, name: str = "") -> str:
    parts = [_api_path(kind)]
    if kind.namespaced and namespace is not None:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(kind.plural)
    if name:
        parts.append(quote(name, safe=""))
    return "/".join(parts)


def _selector_query(label_selector: str) -> dict[str, str]:
    return {"labelSelector": label_selector} if label_selector else {}


def _decode_watch_event(request: str, line: bytes) -> WatchEvent:
    """Return the event of one line; raises the KubeApiError of an ERROR event."""
    try:
        payload = json.loads(line)
        event = WatchEvent(payload["type"], payload["object"])
    except (ValueError, LookupError, TypeError) as error:
        message = f"{request}: got no watch event: {line[:200].decode(errors='replace')}"
        raise KubeApiError(message, status=200, reason="NotJson") from error
    if event.type == "ERROR":
        raise error_from_status(
            event.object.get("code") or 500,
            reason=event.object.get("reason") or "",
            message=f"{request}: {event.object.get('message') or 'no reason given'}",
        )
    return event
