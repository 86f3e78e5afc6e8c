"""The sandboxes that a platform knows, and waking those who watch them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from faasmoe_operator.platforms.base import Sandbox, SandboxEvent

MAX_DELETION_REASONS = 1024


class ChangeNotifier:
    """Wakes everyone who waits for a condition when something may have met it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Let all waiters look again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at once for each notification."""
        while not condition():
            await self._event.wait()


class SandboxRegistry:
    """Which sandboxes there are. Watchers compare states, so none can pile up unread events."""

    def __init__(self) -> None:
        self._sandboxes: dict[str, Sandbox] = {}
        self._deletion_reasons: dict[str, str] = {}
        self._notifier = ChangeNotifier()

    def get(self, sandbox_id: str) -> Sandbox | None:
        """Return a sandbox, or None if it is gone."""
        return self._sandboxes.get(sandbox_id)

    def all(self) -> tuple[Sandbox, ...]:
        """Return every sandbox, oldest first."""
        return tuple(self._sandboxes.values())

    def upsert(self, sandbox: Sandbox) -> None:
        """Add a sandbox, or replace what is known of it."""
        self._sandboxes[sandbox.id] = sandbox
        self._notifier.notify()

    def remove(self, sandbox_id: str, *, reason: str) -> None:
        """Strike a sandbox off, if it is there, and keep why for those who watch."""
        if self._sandboxes.pop(sandbox_id, None) is None:
            return
        self._deletion_reasons[sandbox_id] = reason
        while len(self._deletion_reasons) > MAX_DELETION_REASONS:
            del self._deletion_reasons[next(iter(self._deletion_reasons))]
        self._notifier.notify()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there at this call, then what changes, without end."""
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
