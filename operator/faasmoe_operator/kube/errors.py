"""Errors of the Kubernetes API client, one class for each way of reacting to them.

KubeApiError
├── NotFound     404: no such object, or the API does not serve its kind
├── Conflict     409: the object already exists, or has changed since it was read
├── Expired      410: a resourceVersion or continue token is older than the server's history
├── Forbidden    403: denied by RBAC, a quota or an admission policy
│   ├── NamespaceTerminating   the namespace is being deleted, and nothing can be created in it
│   └── NodeTooSmall           a pod's node has less than a resize asks for
├── Invalid      422 and 400: the object violates its schema
└── Unavailable  no response, 5xx or 429: worth a retry later
"""

from __future__ import annotations

from collections.abc import Collection

from faasmoe_operator.errors import FaasmoeError


class KubeApiError(FaasmoeError):
    """A request to the Kubernetes API failed.

    Attributes:
        status: HTTP status; 0 if there was no response.
        reason: the API's CamelCase reason, such as AlreadyExists.
    """

    def __init__(self, message: str, *, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class NotFound(KubeApiError):
    """The object does not exist, or the cluster does not serve its kind."""


class Conflict(KubeApiError):
    """The object already exists, or its uid or resourceVersion is not the expected one."""

    @property
    def already_exists(self) -> bool:
        """Whether an object of that name already exists."""
        return self.reason == "AlreadyExists"


class Expired(KubeApiError):
    """A resourceVersion or continue token is too old; only a new list helps."""


class Forbidden(KubeApiError):
    """RBAC, a quota or an admission policy denied the request."""


class NamespaceTerminating(Forbidden):
    """The namespace is being deleted; its MoEModels follow."""


class NodeTooSmall(Forbidden):
    """A resize asks for more than the pod's node has, used or not."""


class Invalid(KubeApiError):
    """The object violates its schema."""


class Unavailable(KubeApiError):
    """The API server did not respond, failed, or asked to retry later.

    Attributes:
        retry_after_s: the server's Retry-After in seconds; None if it sent none.
    """

    def __init__(
        self, message: str, *, status: int, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status=status, reason=reason)
        self.retry_after_s = retry_after_s


NAMESPACE_TERMINATING = "NamespaceTerminating"
NODE_TOO_SMALL = "NodeTooSmall"
_NODE_TOO_SMALL_TEXT = "node didn't have enough allocatable resources"
"""Kubernetes 1.36 has neither a reason nor a cause for it."""
_ERROR_TYPES: dict[int, type[KubeApiError]] = {
    400: Invalid,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Expired,
    422: Invalid,
}


def error_from_status(
    status: int,
    *,
    reason: str,
    message: str,
    retry_after_s: float | None = None,
    causes: Collection[str] = (),
) -> KubeApiError:
    """Return the error that stands for an HTTP status and the reasons of its causes."""
    if status == 403 and NAMESPACE_TERMINATING in causes:
        return NamespaceTerminating(message, status=status, reason=NAMESPACE_TERMINATING)
    if status == 403 and _NODE_TOO_SMALL_TEXT in message:
        return NodeTooSmall(message, status=status, reason=NODE_TOO_SMALL)
    if status == 429 or status >= 500:
        return Unavailable(message, status=status, reason=reason, retry_after_s=retry_after_s)
    return _ERROR_TYPES.get(status, KubeApiError)(message, status=status, reason=reason)
