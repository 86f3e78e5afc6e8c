"""Errors that a sandbox reports to its clients.

SandboxError
├── UnknownFunction    404  the function is not attached
├── AttachRefused      409  the sandbox is full, or the id is attached with other experts
├── BadAttachment      422  a field of the attachment is invalid
├── MailboxRefused     409  the shared memory cannot be served as a mailbox
├── BadFrame           400  the frame violates the wire format or does not match the function
├── SandboxOverloaded  429  too many request bodies are being read
├── OutOfMemory        503  allocation failed, or the memory budget is exceeded
├── BlockCorrupted     503  bytes of the store do not match their digest
├── StoreUnavailable   503  no block server served what the function needs
├── SandboxDraining    503  the sandbox is shutting down
└── SandboxDeviceLost  503  the device is unusable and the sandbox exits

Each has a stable machine-readable `code`, the offending `field` and an HTTP `status`.
"""

from __future__ import annotations


class SandboxError(Exception):
    """A rejected request.

    Attributes:
        status: HTTP status.
        code: stable machine-readable code.
        field: offending field or header, None if there is none.
    """

    status = 500
    code = "internal"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON object of the HTTP response."""
        return {"error": {"code": self.code, "message": str(self), "field": self.field}}


class UnknownFunction(SandboxError):
    """The function is not attached to this sandbox."""

    status = 404
    code = "unknown_function"


class AttachRefused(SandboxError):
    """The sandbox is full, or the id is attached with other experts."""

    status = 409
    code = "attach_refused"


class BadAttachment(SandboxError):
    """A field of an attachment is invalid."""

    status = 422
    code = "bad_attachment"


class MailboxRefused(SandboxError):
    """The shared memory cannot be served as a mailbox; the router goes on over HTTP."""

    status = 409
    code = "mailbox_refused"


class BadFrame(SandboxError):
    """The frame is malformed or does not match the function."""

    status = 400
    code = "bad_frame"


class SandboxOverloaded(SandboxError):
    """Too many request bodies, or too many bytes of them, are being read."""

    status = 429
    code = "overloaded"


class OutOfMemory(SandboxError):
    """Allocation failed or the budget is exceeded; smaller requests may succeed."""

    status = 503
    code = "out_of_memory"


class BlockCorrupted(SandboxError):
    """Bytes of the function's block in the store do not match their digest."""

    status = 503
    code = "corrupted"


class StoreUnavailable(SandboxError):
    """No block server served what the function needs, or it cannot be written to the cache."""

    status = 503
    code = "store_unavailable"


class SandboxDraining(SandboxError):
    """The sandbox is shutting down; another one should do the work."""

    status = 503
    code = "draining"


class SandboxDeviceLost(SandboxError):
    """The device is unusable for the rest of this process; only a new process can use it."""

    status = 503
    code = "device_lost"
