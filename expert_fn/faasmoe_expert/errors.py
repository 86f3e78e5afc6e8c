"""What a sandbox refuses.

SandboxError
├── UnknownFunction   404  the function is not attached here
├── AttachRefused     409  another function holds the place, or the id means something else
├── BadAttachment     422  a field of the attachment cannot be used
├── BadFrame          400  a frame that breaks the wire format, or does not fit the function
├── Overloaded        429  more is sent at once than the sandbox takes in
├── OutOfMemory       503  memory for this frame or attachment cannot be had, or is not allowed
├── Corrupted         503  bytes of the store are not those that were prepared
├── Draining          503  the sandbox ends and takes no more work
└── DeviceLost        503  the sandbox's device cannot be used any more, so that it ends

Each carries a machine-stable `code`, the `field` at fault and an HTTP `status`.
"""

from __future__ import annotations


class SandboxError(Exception):
    """A request that a sandbox refuses; the sandbox itself goes on."""

    status = 500
    code = "internal"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """Return the error object of the HTTP answer."""
        return {"error": {"code": self.code, "message": str(self), "field": self.field}}


class UnknownFunction(SandboxError):
    """The function is not attached to this sandbox."""

    status = 404
    code = "unknown_function"


class AttachRefused(SandboxError):
    """The sandbox is full, or holds this id with other experts."""

    status = 409
    code = "attach_refused"


class BadAttachment(SandboxError):
    """A field of an attachment cannot be used."""

    status = 422
    code = "bad_attachment"


class BadFrame(SandboxError):
    """A frame that is malformed or does not fit the function."""

    status = 400
    code = "bad_frame"


class SandboxOverloaded(SandboxError):
    """More is sent at once than the sandbox takes in."""

    status = 429
    code = "overloaded"


class OutOfMemory(SandboxError):
    """Memory for one frame or attachment cannot be had; smaller ones may find some."""

    status = 503
    code = "out_of_memory"


class BlockCorrupted(SandboxError):
    """Bytes of the store that a function needs are not those that were prepared."""

    status = 503
    code = "corrupted"


class SandboxDraining(SandboxError):
    """The sandbox ends: work goes elsewhere."""

    status = 503
    code = "draining"


class SandboxDeviceLost(SandboxError):
    """The device failed for good, as far as this process goes: another one takes its place."""

    status = 503
    code = "device_lost"
