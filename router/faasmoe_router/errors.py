"""All errors that the router raises on purpose.

RouterError
├── RouterConfigError       an invalid setting; the process cannot start
├── TenantsConfigError      an invalid tenants file
├── ChatTemplateError       messages that the model's chat template rejects
├── GrammarError            a grammar that cannot constrain a text
├── RequestTooLarge         more tokens than the tenant may ever reserve
├── RateLimitExceeded       a tenant's rate limit
├── QueueFull               too much waits already
│   ├── TenantQueueFull     a tenant's part of the queue is full
│   ├── EngineQueueFull     the engine's queue is full
│   └── ActivationQueueFull the queue for cold functions is full
├── ActivationTimeout       functions were not activated in time
├── EngineUnavailable       the engine is starting, stopped or has given up
├── EngineDeviceLost        the model's device is unusable; fatal
├── StoreUnreadable         the store is away; only the requests that need it fail
├── StoreCorrupted          bytes of the store fail verification everywhere
└── GenerationFailed        an accepted request cannot be finished
    ├── NoTokenAllowed      its constraints allow no further token
    └── ModelPartUnavailable  a part of the model cannot be read or computed at the moment

ControlError                calls to the control plane; never ends the router
├── ControlUnreachable      no connection, or it was cut or stalled
├── ControlRejected         an unsuccessful status
└── ControlProtocolError    a response that violates the protocol

PrepareError                checkpoint preparation; carries `reason` and `is_permanent`
├── SourceNotFound          no such checkpoint, revision or file
├── SourceUnsupported       a checkpoint that cannot be served; permanent
│   ├── WeightsNotFinite    it has weights that are NaN or infinite
│   └── SourceDamaged       a file of it is truncated, or contradicts itself
├── StoreMismatch           the folder holds something else; permanent
├── HubUnauthorized         the Hugging Face Hub requires an authorized token
├── HubUnavailable          the Hub is unreachable, failing or rate-limiting
└── NoSpace                 the volume is full
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping


class RouterError(Exception):
    """Base of the errors of serving: settings, requests, engine and store."""


class RouterConfigError(RouterError):
    """An invalid setting, with which the process cannot start; the message names the variable."""


class ChatTemplateError(RouterError):
    """The model has no chat template, or it rejects the messages."""


class EngineUnavailable(RouterError):
    """The engine is not running: it is (re)starting, was stopped or has given up."""


class QueueFull(RouterError):
    """Base of what is refused because too much waits already.

    Attributes:
        retry_after_s: seconds until there will be a place, as far as that is known.
    """

    retry_after_s = 1.0


class EngineQueueFull(QueueFull):
    """The engine holds its maximum number of requests."""


class ActivationQueueFull(QueueFull):
    """The maximum number of requests, or bytes, already waits for functions to be activated."""


class ActivationTimeout(RouterError):
    """Functions that a request needs were not activated in time."""


class StoreUnreadable(RouterError):
    """The store cannot be read: removed, or away for a while, such as a network file system."""


class StoreCorrupted(RouterError):
    """Bytes of the store that a request needs fail verification, and no sandbox has valid ones."""


class EngineDeviceLost(RouterError):
    """This process cannot use the model's device any more; only a new process can."""


class GenerationFailed(RouterError):
    """An accepted request could not be finished."""


class GrammarError(RouterError):
    """A grammar that cannot constrain a text: invalid, unsupported, too large or too expensive."""


class NoTokenAllowed(GenerationFailed):
    """A request's constraints allow no further token, or its grammar takes too much time."""


class ModelPartUnavailable(GenerationFailed):
    """A part of the model can be neither called nor read at the moment; a retry may succeed."""


class TenantsConfigError(RouterError):
    """An invalid tenants file; the message names the field."""


class RateLimitExceeded(RouterError):
    """A tenant exceeds its requests or tokens per minute.

    Attributes:
        retry_after_s: seconds until the request is admitted if the tenant sends no other.
        headers: x-ratelimit-* response headers with the remaining quota.
    """

    def __init__(
        self, message: str, *, retry_after_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class TenantQueueFull(QueueFull):
    """The maximum number of a tenant's sequences already waits."""


class RequestTooLarge(RouterError):
    """A request exceeds what its tenant may ever reserve; waiting does not help."""


class ControlError(Exception):
    """A call to the control plane failed."""


class ControlUnreachable(ControlError):
    """The control plane cannot be reached, or it cut or stalled the call."""


class ControlRejected(ControlError):
    """The control plane responded with an unsuccessful HTTP status.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class ControlProtocolError(ControlError):
    """The control plane's response violates the protocol; the message names the field."""


_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class PrepareError(Exception):
    """A checkpoint cannot be prepared.

    Attributes:
        reason: machine-readable reason; part of the API, never changes.
        is_permanent: whether retrying is pointless.
    """

    reason = "Failed"
    is_permanent = False


class SourceNotFound(PrepareError):
    """The checkpoint, its revision or one of its files does not exist."""

    reason = "SourceNotFound"


class SourceUnsupported(PrepareError):
    """The checkpoint cannot be served: quantised, of an unknown class or without experts."""

    reason = "SourceUnsupported"
    is_permanent = True


class WeightsNotFinite(SourceUnsupported):
    """The checkpoint has weights that are NaN or infinite."""


class SourceDamaged(SourceUnsupported):
    """A file of the checkpoint is truncated, or contradicts itself; names file, got, expected."""


class StoreMismatch(PrepareError):
    """The target folder holds a store of another checkpoint, or files that are no store."""

    reason = "StoreMismatch"
    is_permanent = True


class HubUnauthorized(PrepareError):
    """The Hugging Face Hub requires a token that has access."""

    reason = "HubUnauthorized"


class HubUnavailable(PrepareError):
    """The Hugging Face Hub is unreachable, failing or rate-limiting."""

    reason = "HubUnavailable"


class NoSpace(PrepareError):
    """The volume is full."""

    reason = "NoSpace"


def failure_reason(error: BaseException) -> str:
    """Return the machine-readable reason of a failure; finds a full volume in its causes."""
    is_disk_full = (
        isinstance(cause, OSError) and cause.errno in _DISK_FULL_ERRNOS
        for cause in cause_chain(error)
    )
    if any(is_disk_full):
        return NoSpace.reason
    return error.reason if isinstance(error, PrepareError) else PrepareError.reason


def cause_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the chain of its explicit causes, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
