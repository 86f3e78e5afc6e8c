"""What the control core asks of a platform, and the values it speaks in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeVar


class SandboxTemplate(Protocol):
    """What all generic sandboxes of a model have in common; the rest of it is its platform's."""

    @property
    def digest(self) -> str:
        """The template's hash: sandboxes of another one are to be replaced."""
        ...

    @property
    def capacity(self) -> int:
        """Functions that one sandbox can hold."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessSandboxTemplate:
    """The process platform's template.

    Attributes:
        capacity: functions that one sandbox can hold.
        device: where it computes: auto, cpu or cuda.
        threads: its compute threads.
    """

    capacity: int = 1
    device: str = "auto"
    threads: int = 1

    @property
    def digest(self) -> str:
        """The template's hash: sandboxes of another one are to be replaced."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox as the platform sees it.

    Attributes:
        id: its name, unique for the platform's lifetime.
        address: `host:port` of its API.
        ready: it answers, and is not being deleted.
        template_hash: digest of the template that it was made from.
        pid: its process, where the platform knows one.
    """

    id: str
    address: str
    ready: bool
    template_hash: str
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class SandboxEvent:
    """A change: what a sandbox is like now, or was like when it went.

    Attributes:
        kind: `deleted` when it is gone, `changed` when it came or changed.
        sandbox: its last known state.
        reason: why it went, in words; empty if it did not go.
    """

    kind: Literal["changed", "deleted"]
    sandbox: Sandbox
    reason: str = ""


AnyTemplate = TypeVar("AnyTemplate", bound=SandboxTemplate, contravariant=True)


class Platform(Protocol[AnyTemplate]):
    """The four verbs."""

    async def create(self, template: AnyTemplate) -> Sandbox:
        """Start a generic sandbox, ready or not yet; raises PlatformError."""
        ...

    async def delete(self, sandbox_id: str) -> None:
        """Begin to end a sandbox; nothing happens if there is none of that name."""
        ...

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox that is not gone, oldest first."""
        ...

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there at this call, then what changes, without end.

        States between two steps of a slow reader may be left out; the last one never is. One that
        is there at the call and gone before the first step is told as deleted.
        """
        ...
