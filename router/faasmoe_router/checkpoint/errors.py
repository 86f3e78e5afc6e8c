"""The errors of checkpoint preparation; the message says what is missing.

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
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT)


class PrepareError(Exception):
    """A checkpoint or a store folder that cannot be used."""

    reason = "Failed"
    is_final = False


class SourceNotFound(PrepareError):
    """The checkpoint, its revision or one of its files is not there."""

    reason = "SourceNotFound"


class SourceUnsupported(PrepareError):
    """A checkpoint that is not served: quantised, of an unknown class, without experts."""

    reason = "SourceUnsupported"
    is_final = True


class StoreMismatch(PrepareError):
    """The folder holds a store of something else, or no store at all."""

    reason = "StoreMismatch"
    is_final = True


class HubUnauthorized(PrepareError):
    """The hub wants a token that was granted access."""

    reason = "HubUnauthorized"


class HubUnavailable(PrepareError):
    """The hub cannot be reached, is out of order or asks for patience."""

    reason = "HubUnavailable"


class NoSpace(PrepareError):
    """The volume is too small."""

    reason = "NoSpace"


def reason_of(error: BaseException) -> str:
    """Return the reason of a failure; a full volume is told by whatever error it led to."""
    full = (isinstance(cause, OSError) and cause.errno in _FULL for cause in causes(error))
    if any(full):
        return NoSpace.reason
    return error.reason if isinstance(error, PrepareError) else PrepareError.reason


def causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it was raised from, the last one first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
