"""The router's errors.

RouterError
├── ConfigError           a setting that the process cannot start with
├── ChatTemplateError     messages that the model's chat template does not take
├── EngineUnavailable     the engine does not run (starting again, stopped, or given up)
├── EngineSaturated       more requests wait than the engine may hold
├── HoldQueueFull         more requests wait for functions to be started than may
├── ActivationTimeout     functions that a request needs could not be started in time
├── StoreUnreadable       the store was removed or damaged while it was served
├── ConstraintError       a grammar that a text cannot be held to
├── StoreCorrupted        bytes of the store that a request needs are wrong, and no sandbox has them
└── GenerationFailed      a request that had been accepted could not be finished
    └── NoTokenAllowed    its own constraints leave no token that may come next

What goes wrong with tenants.

RouterError
├── DocumentError      a tenants file that cannot be used
├── RateLimited        a tenant has spent what it may ask for in a minute
├── TenantQueueFull    too many of a tenant's requests wait already
└── NeverFits          a request that no waiting would let through

What can go wrong with the control plane. None of it ends the router.

ControlError
├── Unreachable   it is away, or it cut or stalled the call
├── Rejected      it answered with another status than success
└── Garbage       it sent what the contract does not have

The errors of checkpoint preparation; the message says what is missing.

PrepareError
├── SourceNotFound      the checkpoint, its revision or one of its files is not there
├── SourceUnsupported   a checkpoint that is not served, whatever is tried
├── StoreMismatch       the folder holds another store, or something else
├── HubUnauthorized     the hub wants a token that was granted access
├── HubUnavailable      the hub cannot be reached or is out of order
└── NoSpace             the volume is too small

Each carries a machine-stable `reason`, and whether it is final: trying again cannot help.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping


class RouterError(Exception):
    """Base of all errors that the router raises on purpose."""


class RouterConfigError(RouterError):
    """A setting that the process cannot start with; the message names the variable."""


class ChatTemplateError(RouterError):
    """Messages that the model's chat template does not take."""


class EngineUnavailable(RouterError):
    """The engine does not run: it starts again, was stopped, or has given up."""


class EngineQueueFull(RouterError):
    """More requests wait than the engine may hold."""


class ActivationQueueFull(RouterError):
    """More requests wait for functions to be started than may."""


class ActivationTimeout(RouterError):
    """Functions that a request needs could not be started in time."""


class StoreUnreadable(RouterError):
    """The store was removed or damaged while it was served; starting again does not help."""


class StoreCorrupted(RouterError):
    """Bytes of the store that a request needs are wrong, and no sandbox has right ones."""


class EngineDeviceLost(RouterError):
    """The model's device cannot be used any more by this process; only a new one can go on."""


class GenerationFailed(RouterError):
    """A request that had been accepted could not be finished."""


class GrammarError(RouterError):
    """A grammar that a text cannot be held to: wrong, too large, or of a kind not known here."""


class NoTokenAllowed(GenerationFailed):
    """A request's own constraints leave no token that may come next, or cost too much."""


class TenantsConfigError(RouterError):
    """A tenants file that cannot be used; the message names the field."""


class RateLimitExceeded(RouterError):
    """A tenant has spent what it may ask for in a minute.

    Attributes:
        retry_after_s: when the request would be let through if nobody else asked.
        headers: the x-ratelimit-* headers that say what is left.
    """

    def __init__(
        self, message: str, *, retry_after_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class TenantQueueFull(RouterError):
    """Too many of a tenant's requests wait already."""


class RequestTooLarge(RouterError):
    """A request that asks for more than its tenant may have at once; waiting does not help."""


class ControlError(Exception):
    """A call to the control plane that failed."""


class ControlUnreachable(ControlError):
    """The control plane is away, or it cut or stalled the call."""


class ControlRejected(ControlError):
    """The control plane answered with another status than success."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class ControlProtocolError(ControlError):
    """The control plane sent what the contract does not have; the message names the field."""


_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class PrepareError(Exception):
    """A checkpoint or a store folder that cannot be used."""

    reason = "Failed"
    is_permanent = False


class SourceNotFound(PrepareError):
    """The checkpoint, its revision or one of its files is not there."""

    reason = "SourceNotFound"


class SourceUnsupported(PrepareError):
    """A checkpoint that is not served: quantised, of an unknown class, without experts."""

    reason = "SourceUnsupported"
    is_permanent = True


class StoreMismatch(PrepareError):
    """The folder holds a store of something else, or no store at all."""

    reason = "StoreMismatch"
    is_permanent = True


class HubUnauthorized(PrepareError):
    """The hub wants a token that was granted access."""

    reason = "HubUnauthorized"


class HubUnavailable(PrepareError):
    """The hub cannot be reached, is out of order or asks for patience."""

    reason = "HubUnavailable"


class NoSpace(PrepareError):
    """The volume is too small."""

    reason = "NoSpace"


def failure_reason(error: BaseException) -> str:
    """Return the reason of a failure; a full volume is told by whatever error it led to."""
    is_disk_full = (
        isinstance(cause, OSError) and cause.errno in _DISK_FULL_ERRNOS
        for cause in cause_chain(error)
    )
    if any(is_disk_full):
        return NoSpace.reason
    return error.reason if isinstance(error, PrepareError) else PrepareError.reason


def cause_chain(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it was raised from, the last one first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
