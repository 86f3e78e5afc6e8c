"""What the Kubernetes API answers that is not what was asked for.

ApiError
├── NotFound     404: no such object, or no such API
├── Conflict     409: exists already, or has changed since it was read
├── Forbidden    403: RBAC, a quota or an admission rule
├── Invalid      422 and 400: the object breaks a rule of its schema
└── Unavailable  no answer, 5xx or 429: worth asking again later
"""

from __future__ import annotations

from faasmoe_operator.errors import FaasmoeError


class KubeApiError(FaasmoeError):
    """An answer of the API that says no.

    Attributes:
        status: the HTTP status; 0 if there was no answer.
        reason: the API's CamelCase word for it, such as AlreadyExists.
    """

    def __init__(self, message: str, *, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class NotFound(KubeApiError):
    """There is no such object, or the cluster does not serve its kind."""


class Conflict(KubeApiError):
    """The object exists already, or is not the one, or not as it was, that was meant."""

    @property
    def already_exists(self) -> bool:
        """Whether an object of that name was there already."""
        return self.reason == "AlreadyExists"


class Forbidden(KubeApiError):
    """RBAC, a quota or an admission rule refused it."""


class Invalid(KubeApiError):
    """The object breaks a rule of its schema."""


class Unavailable(KubeApiError):
    """The API did not answer, could not, or asked to be left alone for a while.

    Attributes:
        retry_after_s: how long it asked for; None if it did not say.
    """

    def __init__(
        self, message: str, *, status: int, reason: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status=status, reason=reason)
        self.retry_after_s = retry_after_s


def error_from_status(
    status: int, *, reason: str, message: str, retry_after_s: float | None = None
) -> KubeApiError:
    """Return the error of an HTTP status."""
    if status == 429 or status >= 500:
        return Unavailable(message, status=status, reason=reason, retry_after_s=retry_after_s)
    error_types = {400: Invalid, 403: Forbidden, 404: NotFound, 409: Conflict, 422: Invalid}
    return error_types.get(status, KubeApiError)(message, status=status, reason=reason)
