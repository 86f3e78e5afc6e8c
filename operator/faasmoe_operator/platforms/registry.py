"""The sandboxes that a platform knows, as a watchable map from id to state."""

from __future__ import annotations

from collections.abc import AsyncIterator

from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent

MAX_DELETION_REASONS = 1024


class SandboxRegistry:
    """Known sandboxes and the reasons of recent deletions.

    Each watcher compares the current state with the last one that it yielded, so a slow watcher
    skips intermediate states and no queue of unread events can grow.
    """

    def __init__(self) -> None:
        self._sandboxes: dict[str, Sandbox] = {}
        self._deletion_reasons: dict[str, str] = {}
        self._notifier = ChangeNotifier()

    def get(self, sandbox_id: str) -> Sandbox | None:
        """Return a sandbox, or None if it does not exist."""
        return self._sandboxes.get(sandbox_id)

    def all(self) -> tuple[Sandbox, ...]:
        """Return every sandbox, oldest first."""
        return tuple(self._sandboxes.values())

    def upsert(self, sandbox: Sandbox) -> None:
        """Add a sandbox or replace its state."""
        self._sandboxes[sandbox.id] = sandbox
        self._notifier.notify()

    def remove(self, sandbox_id: str, *, reason: str) -> None:
        """Remove a sandbox, if it exists, and record the reason for watchers."""
        if self._sandboxes.pop(sandbox_id, None) is None:
            return
        self._deletion_reasons[sandbox_id] = reason
        while len(self._deletion_reasons) > MAX_DELETION_REASONS:
            del self._deletion_reasons[next(iter(self._deletion_reasons))]
        self._notifier.notify()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every sandbox that exists at this call, then changes, without end."""
        return self._watch_from(dict(self._sandboxes))

    async def _watch_from(self, seen: dict[str, Sandbox]) -> AsyncIterator[SandboxEvent]:
        reported: dict[str, Sandbox] = {}
        while True:
            current = dict(self._sandboxes)
            for name, sandbox in seen.items():
                if name not in current:
                    yield SandboxEvent(
                        "deleted", sandbox, self._deletion_reasons.get(name, "unknown")
                    )
            for name, sandbox in current.items():
                if reported.get(name) != sandbox:
                    yield SandboxEvent("changed", sandbox)
            seen = reported = current
            await self._notifier.wait_for(lambda seen=seen: self._sandboxes != seen)  # type: ignore[misc]
