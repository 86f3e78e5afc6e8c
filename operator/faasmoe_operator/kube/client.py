"""What the operator asks of the Kubernetes API: the port that a fake can stand in for.

The Kubernetes API's verbs on paths from static kinds, JSON in and out.

`kubernetes.aio`'s own `DynamicClient` is not used: it asks the API for every group that the cluster
serves before its first request (some 30 requests), keeps them in a file under /tmp, which a
read-only container does not have, wraps every answer in objects, and can pass no
`fieldValidation`. Configuration, TLS, credentials and their renewal are the library's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self
from urllib.parse import quote

from faasmoe_operator.kube.errors import Conflict, NotFound
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER
from faasmoe_operator.kube.transport import KubeTransport
from faasmoe_operator.kube.types import Kind, Object


class KubeApi(Protocol):
    """Requests on objects. Every method raises ApiError; `kube.errors` tells them apart."""

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return an object, or None if there is none of that name."""
        ...

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Object]:
        """Return the objects of a namespace, or of all for None."""
        ...

    async def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object; raises Conflict whose `exists` is true if the name is taken."""
        ...

    async def apply(self, kind: Kind, obj: Object) -> Object:
        """Make an object be as given in all that is given (server-side apply, forced).

        A uid or resourceVersion in its metadata is a condition: Conflict if it is another's.
        """
        ...

    async def merge_patch(self, kind: Kind, obj: Object) -> Object:
        """Make an object's fields but metadata and status be as given, its lists as a whole.

        Server-side apply leaves entries of lists alone that somebody else has added; this does not.
        The uid in its metadata, if it has one, is a condition: Conflict if it is another's.
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
        """Make an object's status be as given; raises NotFound if it is gone.

        Args:
            kind: the object's kind.
            namespace: the object's namespace.
            name: the object's name.
            status: the whole status: what was written before and is left out goes.
            uid: which object is meant: Conflict if another has the name now.
            resource_version: the state it was made from: Conflict if it has changed since.
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
        """Set labels and annotations, and remove those that are None; raises NotFound."""
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
        """Begin to delete an object; nothing if it is gone, or another has its name now."""
        ...


PAGE_SIZE = 500
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"


class KubeClient:
    """A KubeApi over HTTP; a context manager.

    Args:
        transport: sends requests; closed with the client.
    """

    def __init__(self, transport: KubeTransport) -> None:
        self._transport = transport
        self._request = transport.request

    async def __aenter__(self) -> Self:
        """Return it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._transport.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return an object, or None if there is none of that name."""
        try:
            return await self._request("get", kind, _resource_path(kind, namespace, name))
        except NotFound:
            return None

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Object]:
        """Return the objects of a namespace, or of all for None."""
        query = {"limit": str(PAGE_SIZE)}
        if label_selector:
            query["labelSelector"] = label_selector
        objects: list[Object] = []
        while True:
            page = await self._request("list", kind, _resource_path(kind, namespace), query=query)
            # Items of a list carry neither, objects read one by one do.
            type_meta = {"apiVersion": kind.api_version, "kind": kind.name}
            objects += [{**type_meta, **item} for item in page.get("items", [])]
            continue_token = page.get("metadata", {}).get("continue")
            if not continue_token:
                return objects
            query["continue"] = continue_token

    async def create(self, kind: Kind, obj: Object) -> Object:
        """Create an object; raises Conflict whose `exists` is true if the name is taken."""
        path = _resource_path(kind, obj["metadata"].get("namespace"))
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return await self._request("create", kind, path, query=query, body=obj)

    async def apply(self, kind: Kind, obj: Object) -> Object:
        """Make an object be as given in all that is given (server-side apply, forced)."""
        path = _resource_path(kind, obj["metadata"].get("namespace"), obj["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        return await self._request("apply", kind, path, query=query, body=obj, content=APPLY_PATCH)

    async def merge_patch(self, kind: Kind, obj: Object) -> Object:
        """Make an object's fields but metadata and status be as given, its lists as a whole."""
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
        """Make an object's status be as given; raises NotFound if it is gone.

        Fields that an older CRD does not know are dropped by the server, not refused: a status
        with less in it is better than none.
        """
        metadata = {"name": name, "namespace": namespace}
        if uid is not None:
            metadata["uid"] = uid
        if resource_version is not None:
            metadata["resourceVersion"] = resource_version
        named = {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata}
        path = _resource_path(kind, namespace, name) + "/status"
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        body = {**named, "status": status}
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
        """Set labels and annotations, and remove those that are None; raises NotFound."""
        metadata = {"labels": dict(labels or {}), "annotations": dict(annotations or {})}
        body = {"metadata": {field: values for field, values in metadata.items() if values}}
        query = {"fieldManager": FIELD_MANAGER}
        path = _resource_path(kind, namespace, name)
        return await self._request("patch", kind, path, query=query, body=body, content=MERGE_PATCH)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> None:
        """Begin to delete an object; nothing if it is gone, or another has its name now."""
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
        """Return whether the cluster serves a kind of object."""
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
