"""The interface between the control core and a platform, and its value types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeVar


class SandboxTemplate(Protocol):
    """What all sandboxes of a model are created from; the rest is specific to the platform."""

    @property
    def digest(self) -> str:
        """Hash of the template; sandboxes with another hash are outdated and get replaced."""
        ...

    @property
    def capacity(self) -> int:
        """Maximum number of functions in one sandbox."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessSandboxTemplate:
    """Template of the process platform.

    Attributes:
        capacity: maximum number of functions in one sandbox.
        device: compute device: auto, cpu or cuda.
        threads: number of compute threads.
    """

    capacity: int = 1
    device: str = "auto"
    threads: int = 1

    @property
    def digest(self) -> str:
        """Hash of the template; sandboxes with another hash are outdated and get replaced."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox as the platform observes it.

    Attributes:
        id: unique for the platform's lifetime.
        address: `host:port` of its API.
        ready: whether it responds and is not being deleted.
        template_hash: digest of the template that it was created from.
        pid: its process id, where the platform knows it.
        node: name of its machine; empty for this one.
        terminating: whether it is being deleted, by this controller or by others.
    """

    id: str
    address: str
    ready: bool
    template_hash: str
    pid: int | None = None
    node: str = ""
    terminating: bool = False


@dataclass(frozen=True, slots=True)
class SandboxEvent:
    """A change of one sandbox.

    Attributes:
        kind: `changed` when it was created or updated, `deleted` when it no longer exists.
        sandbox: its last known state.
        reason: why it was deleted, for humans; empty for `changed`.
    """

    kind: Literal["changed", "deleted"]
    sandbox: Sandbox
    reason: str = ""


AnyTemplate = TypeVar("AnyTemplate", bound=SandboxTemplate, contravariant=True)


class Platform(Protocol[AnyTemplate]):
    """Runs sandboxes; knows nothing of functions."""

    async def create(self, template: AnyTemplate) -> Sandbox:
        """Create an empty sandbox, which may become ready later; raises PlatformError."""
        ...

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        """Start the deletion of a sandbox; does nothing if it does not exist.

        Args:
            sandbox_id: the sandbox.
            at_once: whether it gets no time for calls in flight, as nobody calls it any more.
            failed: whether it has failed, which matters where several models share one.
        """
        ...

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox that exists, terminating ones included, oldest first."""
        ...

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every sandbox that exists at this call, then changes, without end.

        A slow consumer may miss intermediate states but never the last one. A sandbox that exists
        at the call but not at the first step is yielded as deleted.
        """
        ...
