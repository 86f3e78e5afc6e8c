"""Process platform: sandboxes are processes of this machine, forked from a zygote.

Knows nothing of functions. This module neither starts nor restarts the zygote: it connects to its
unix socket, reconnects when the connection ends, and lists the running sandboxes on every
connection. Sandboxes exit with their zygote and are then reported as deleted.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import ProcessSandboxTemplate, Sandbox, SandboxEvent
from faasmoe_operator.platforms.readiness import ReadinessProber
from faasmoe_operator.platforms.registry import SandboxRegistry
from faasmoe_operator.platforms.zygote import ZygoteClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessPlatformTiming:
    """Intervals and timeouts of the process platform.

    Attributes:
        connect_timeout_s: timeout of the first connection, the zygote's own start included.
        connect_interval_s: seconds between two connection attempts.
        create_timeout_s: how long a sandbox may take to get an address, including the replacement
            of a zygote that died.
        probe_interval_s: seconds between two readiness probes of a starting sandbox.
        probe_timeout_s: timeout of one readiness probe.
        grace_s: seconds between SIGTERM and SIGKILL of a deleted sandbox.
    """

    connect_timeout_s: float = 120.0
    connect_interval_s: float = 0.05
    create_timeout_s: float = 30.0
    probe_interval_s: float = 0.02
    probe_timeout_s: float = 1.0
    grace_s: float = 5.0


@dataclass(slots=True)
class _PendingSandbox:
    template: ProcessSandboxTemplate
    sandbox: asyncio.Future[Sandbox]


class ProcessPlatform:
    """Runs sandboxes as local processes; use as an async context manager.

    Args:
        socket: the zygote's unix socket.
        timing: intervals and timeouts.
    """

    def __init__(self, *, socket: Path, timing: ProcessPlatformTiming | None = None) -> None:
        self._socket = socket
        self._timing = timing or ProcessPlatformTiming()
        self._zygote: ZygoteClient | None = None
        self._zygote_notifier = ChangeNotifier()
        self._registry = SandboxRegistry()
        self._pending: dict[str, _PendingSandbox] = {}
        self._prober = ReadinessProber(
            interval_s=self._timing.probe_interval_s,
            timeout_s=self._timing.probe_timeout_s,
            on_ready=self._mark_ready,
        )

    async def __aenter__(self) -> Self:
        """Connect to the zygote and list its sandboxes; raises PlatformError."""
        self._prober.open()
        self._connection_task = asyncio.create_task(self._keep_connected())
        timeout_s = self._timing.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_connected()
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, TimeoutError):
                raise PlatformError(
                    f"zygote socket: no zygote responded at {self._socket} for {timeout_s:g} s"
                ) from None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect from the zygote; it and its sandboxes keep running."""
        self._connection_task.cancel()
        await asyncio.gather(self._connection_task, return_exceptions=True)
        await self._prober.close()

    async def create(self, template: ProcessSandboxTemplate) -> Sandbox:
        """Fork a sandbox; it has an address and becomes ready later. Raises PlatformError."""
        name = f"s{secrets.token_hex(4)}"
        try:
            async with asyncio.timeout(self._timing.create_timeout_s):
                zygote = await self._wait_connected()
                future: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
                self._pending[name] = _PendingSandbox(template, future)
                zygote.send({"verb": "spawn", "id": name, "config": asdict(template)})
                return await future
        except TimeoutError:
            timeout_s = self._timing.create_timeout_s
            raise PlatformError(f"sandbox {name} got no address within {timeout_s:g} s") from None
        finally:
            self._pending.pop(name, None)

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        """Start the deletion of a sandbox: SIGTERM now, SIGKILL after the grace period, if any."""
        sandbox = self._registry.get(sandbox_id)
        if sandbox is None or self._zygote is None:
            return
        self._prober.stop(sandbox_id)
        grace_s = 0.0 if at_once else self._timing.grace_s
        self._zygote.send({"verb": "kill", "id": sandbox_id, "grace_s": grace_s})
        self._registry.upsert(replace(sandbox, ready=False))

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose process has not exited, oldest first."""
        return self._registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every sandbox that exists at this call, then changes, without end."""
        return self._registry.watch()

    async def _wait_connected(self) -> ZygoteClient:
        await self._zygote_notifier.wait_for(lambda: self._zygote is not None)
        assert self._zygote is not None
        return self._zygote

    async def _keep_connected(self) -> None:
        """Connect to the zygote at the socket, and again after each disconnection."""
        while True:
            started_s = time.monotonic()
            try:
                zygote, pid = await ZygoteClient.connect(self._socket)
            except (PlatformError, OSError, TimeoutError) as error:
                logger.debug("zygote not reachable yet: %s", error)
            else:
                await self._handle_events(zygote, pid)
            elapsed_s = time.monotonic() - started_s
            await asyncio.sleep(max(0.0, self._timing.connect_interval_s - elapsed_s))

    async def _handle_events(self, zygote: ZygoteClient, pid: int) -> None:
        zygote.send({"verb": "list"})
        try:
            while (event := await zygote.next_event()) is not None:
                self._handle_event(event, zygote)
            logger.warning("the connection to zygote %d ended", pid)
        finally:
            self._zygote = None
            self._on_disconnected(f"the connection to zygote {pid} ended")
            await zygote.close()

    def _handle_event(self, event: Mapping[str, Any], zygote: ZygoteClient) -> None:
        match event:
            case {"event": "sandboxes", "sandboxes": list(sandboxes)}:
                self._on_listed(sandboxes, zygote)
            case {"event": "spawned", "id": str(name), "pid": int(pid), "address": str(address)}:
                self._on_spawned(name, pid, address, zygote)
            case {"event": "exited", "id": str(name), "status": int(status)}:
                self._prober.stop(name)
                self._registry.remove(name, reason=f"exited with status {status}")
            case {"event": "refused", "id": name, "message": str(message)}:
                self._on_refused(name, message)
            case _:
                logger.error("unknown event from the zygote: %r", event)

    def _on_listed(self, sandboxes: Sequence[Any], zygote: ZygoteClient) -> None:
        for item in sandboxes:
            match item:
                case {"id": str(name), "pid": int(pid), "address": str(address), "config": config}:
                    self._add_sandbox(Sandbox(name, address, False, _template_hash(config), pid))
                case _:
                    logger.error("zygote listed %r, expected id, pid, address, config", item)
        self._zygote = zygote
        self._zygote_notifier.notify()

    def _on_spawned(self, name: str, pid: int, address: str, zygote: ZygoteClient) -> None:
        pending = self._pending.get(name)
        if pending is None or pending.sandbox.done():  # `create` timed out or was cancelled
            zygote.send({"verb": "kill", "id": name, "grace_s": 0})
            return
        sandbox = Sandbox(name, address, False, pending.template.digest, pid)
        self._add_sandbox(sandbox)
        pending.sandbox.set_result(sandbox)

    def _on_refused(self, name: Any, message: str) -> None:
        pending = self._pending.get(name)
        if pending is not None and not pending.sandbox.done():
            pending.sandbox.set_exception(PlatformError(f"sandbox {name}: {message}"))
        else:
            logger.info("the zygote refused a command for %s: %s", name, message)

    def _on_disconnected(self, reason: str) -> None:
        self._prober.stop_all()
        for sandbox in self._registry.all():
            self._registry.remove(sandbox.id, reason=reason)
        for pending in self._pending.values():
            if not pending.sandbox.done():
                pending.sandbox.set_exception(PlatformError(reason))

    def _add_sandbox(self, sandbox: Sandbox) -> None:
        self._registry.upsert(sandbox)
        self._prober.start(sandbox.id, sandbox.address)

    def _mark_ready(self, name: str) -> None:
        if (sandbox := self._registry.get(name)) is not None:
            self._registry.upsert(replace(sandbox, ready=True))


def _template_hash(config: Any) -> str:
    """Return the hash of the template with these settings; empty if they are of no template."""
    try:
        return ProcessSandboxTemplate(**config).digest
    except TypeError:
        return ""
