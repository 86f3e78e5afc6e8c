"""How much memory a process of this machine really costs: its proportional set size.

A page that N processes share counts 1/N in each, so that the sum over processes is what the machine
spends.

The process platform: sandboxes are processes of this machine, forked from a zygote.

Knows nothing of functions. The zygote is another's to start and to replace; here is its client,
which may come and go: what runs is read back from the zygote at each connection. All sandboxes end
with their zygote; then they are reported as gone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import aiohttp

from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import ProcessSandboxTemplate, Sandbox, SandboxEvent
from faasmoe_operator.platforms.registry import ChangeNotifier, SandboxRegistry
from faasmoe_operator.platforms.zygote import ZygoteClient

logger = logging.getLogger(__name__)


_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def pss_bytes(pid: int, *, proc: Path = Path("/proc")) -> int | None:
    """Return the PSS of a process, or None if it is gone or not ours to look at."""
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    found = _PSS.search(text)
    return int(found[1]) * 1024 if found else None


@dataclass(frozen=True, slots=True)
class ProcessPlatformTiming:
    """How often, and how long.

    Attributes:
        connect_timeout_s: for the first connection, the zygote's own start included.
        connect_interval_s: between two attempts to connect.
        create_timeout_s: for a sandbox to get an address, a zygote's replacement included.
        probe_interval_s: between two readiness probes of a sandbox that is not ready.
        probe_timeout_s: for the answer to one probe.
        grace_s: for a deleted sandbox to finish, before it is killed.
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
        socket: the unix socket of the zygote.
        timing: how often, and how long.
    """

    def __init__(self, *, socket: Path, timing: ProcessPlatformTiming | None = None) -> None:
        self._socket = socket
        self._timing = timing or ProcessPlatformTiming()
        self._zygote: ZygoteClient | None = None
        self._zygote_notifier = ChangeNotifier()
        self._registry = SandboxRegistry()
        self._pending: dict[str, _PendingSandbox] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        """Connect and read back the sandboxes that run; raises PlatformError."""
        timeout = aiohttp.ClientTimeout(total=self._timing.probe_timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout)
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
        """Let go of the zygote; it and the sandboxes go on."""
        for task in (self._connection_task, *self._probes.values()):
            task.cancel()
        await asyncio.gather(self._connection_task, *self._probes.values(), return_exceptions=True)
        await self._http.close()

    async def create(self, template: ProcessSandboxTemplate) -> Sandbox:
        """Fork a sandbox: it has an address at once and gets ready later; raises PlatformError."""
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

    async def delete(self, sandbox_id: str) -> None:
        """Begin to end a sandbox: SIGTERM now, SIGKILL after the grace."""
        sandbox = self._registry.get(sandbox_id)
        if sandbox is None or self._zygote is None:
            return
        self._stop_probe(sandbox_id)
        self._zygote.send({"verb": "kill", "id": sandbox_id, "grace_s": self._timing.grace_s})
        self._registry.upsert(replace(sandbox, ready=False))

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose process has not ended, oldest first."""
        return self._registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there, then what changes, without end."""
        return self._registry.watch()

    async def _wait_connected(self) -> ZygoteClient:
        await self._zygote_notifier.wait_for(lambda: self._zygote is not None)
        assert self._zygote is not None
        return self._zygote

    async def _keep_connected(self) -> None:
        """Hold a connection to whatever zygote listens at the socket."""
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

    def _restore_sandboxes(self, sandboxes: Sequence[Any], zygote: ZygoteClient) -> None:
        for found in sandboxes:
            match found:
                case {"id": str(name), "pid": int(pid), "address": str(address), "config": config}:
                    self._add_sandbox(Sandbox(name, address, False, _template_hash(config), pid))
                case _:
                    logger.error("zygote listed %r, expected id, pid, address, config", found)
        self._zygote = zygote
        self._zygote_notifier.notify()

    def _handle_event(self, event: Mapping[str, Any], zygote: ZygoteClient) -> None:
        match event:
            case {"event": "spawned", "id": str(name), "pid": int(pid), "address": str(address)}:
                self._on_spawned(name, pid, address, zygote)
            case {"event": "sandboxes", "sandboxes": list(sandboxes)}:
                self._restore_sandboxes(sandboxes, zygote)
            case {"event": "exited", "id": str(name), "status": int(status)}:
                self._stop_probe(name)
                self._registry.remove(name, reason=f"ended with status {status}")
            case {"event": "refused", "id": name, "message": str(message)}:
                self._on_refused(name, message)
            case _:
                logger.error("unknown event from the zygote: %r", event)

    def _on_spawned(self, name: str, pid: int, address: str, zygote: ZygoteClient) -> None:
        pending = self._pending.get(name)
        if pending is None or pending.sandbox.done():  # nobody waits for it any more
            zygote.send({"verb": "kill", "id": name, "grace_s": 0})
            return
        sandbox = Sandbox(name, address, False, pending.template.digest, pid)
        self._add_sandbox(sandbox)
        pending.sandbox.set_result(sandbox)

    def _add_sandbox(self, sandbox: Sandbox) -> None:
        self._registry.upsert(sandbox)
        self._probes[sandbox.id] = asyncio.create_task(self._probe_until_ready(sandbox))

    def _on_refused(self, name: Any, message: str) -> None:
        pending = self._pending.get(name)
        if pending is not None and not pending.sandbox.done():
            pending.sandbox.set_exception(PlatformError(f"sandbox {name}: {message}"))
        else:
            logger.info("the zygote refused a command for %s: %s", name, message)

    def _on_disconnected(self, reason: str) -> None:
        for name in list(self._probes):
            self._stop_probe(name)
        for sandbox in self._registry.all():
            self._registry.remove(sandbox.id, reason=reason)
        for pending in self._pending.values():
            if not pending.sandbox.done():
                pending.sandbox.set_exception(PlatformError(reason))

    def _stop_probe(self, name: str) -> None:
        if probe := self._probes.pop(name, None):
            probe.cancel()

    async def _probe_until_ready(self, sandbox: Sandbox) -> None:
        """Ask a sandbox until it says that it is ready."""
        while True:
            if await self._is_ready(sandbox.address):
                break
            await asyncio.sleep(self._timing.probe_interval_s)
        self._probes.pop(sandbox.id)
        self._registry.upsert(replace(sandbox, ready=True))

    async def _is_ready(self, address: str) -> bool:
        try:
            async with self._http.get(f"http://{address}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


def _template_hash(config: Any) -> str:
    """Return the hash of the template that these settings are of; none is of any other's."""
    try:
        return ProcessSandboxTemplate(**config).digest
    except TypeError:
        return ""
