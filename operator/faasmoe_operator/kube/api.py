"""What the operator asks of the Kubernetes API: the port that a fake can stand in for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from faasmoe_operator.kube.kinds import Kind, Object


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

    async def merge(self, kind: Kind, obj: Object) -> Object:
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
