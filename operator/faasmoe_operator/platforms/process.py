"""The process platform: sandboxes are processes of this machine, forked from a zygote.

Knows nothing of functions. The zygote is another's to start and to replace; here is its client,
which may come and go: what runs is read back from the zygote at each connection. All sandboxes end
with their zygote; then they are reported as gone.
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

import aiohttp

from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent, SandboxTemplate
from faasmoe_operator.platforms.roster import Change, Roster
from faasmoe_operator.platforms.zygote import ZygoteClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
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
class _Starting:
    template: SandboxTemplate
    sandbox: asyncio.Future[Sandbox]


class ProcessPlatform:
    """Runs sandboxes as local processes; use as an async context manager.

    Args:
        socket: the unix socket of the zygote.
        timing: how often, and how long.
    """

    def __init__(self, *, socket: Path, timing: Timing | None = None) -> None:
        self._socket = socket
        self._timing = timing or Timing()
        self._zygote: ZygoteClient | None = None
        self._zygote_change = Change()
        self._roster = Roster()
        self._starting: dict[str, _Starting] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        """Connect and read back the sandboxes that run; raises PlatformError."""
        timeout = aiohttp.ClientTimeout(total=self._timing.probe_timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout)
        self._link = asyncio.create_task(self._stay_connected())
        timeout_s = self._timing.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected()
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, TimeoutError):
                raise PlatformError(
                    f"zygote socket: nothing answered at {self._socket} for {timeout_s:g} s"
                ) from None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let go of the zygote; it and the sandboxes go on."""
        for task in (self._link, *self._probes.values()):
            task.cancel()
        await asyncio.gather(self._link, *self._probes.values(), return_exceptions=True)
        await self._http.close()

    async def create(self, template: SandboxTemplate) -> Sandbox:
        """Fork a sandbox: it has an address at once and gets ready later; raises PlatformError."""
        name = f"s{secrets.token_hex(4)}"
        try:
            async with asyncio.timeout(self._timing.create_timeout_s):
                zygote = await self._connected()
                future: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
                self._starting[name] = _Starting(template, future)
                zygote.send({"verb": "spawn", "id": name, "config": asdict(template)})
                return await future
        except TimeoutError:
            timeout_s = self._timing.create_timeout_s
            raise PlatformError(f"sandbox {name} had no address after {timeout_s:g} s") from None
        finally:
            self._starting.pop(name, None)

    async def delete(self, sandbox_id: str) -> None:
        """Begin to end a sandbox: SIGTERM now, SIGKILL after the grace."""
        sandbox = self._roster.get(sandbox_id)
        if sandbox is None or self._zygote is None:
            return
        self._stop_probe(sandbox_id)
        self._zygote.send({"verb": "kill", "id": sandbox_id, "grace_s": self._timing.grace_s})
        self._roster.put(replace(sandbox, ready=False))

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose process has not ended, oldest first."""
        return self._roster.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there, then what changes, without end."""
        return self._roster.watch()

    async def _connected(self) -> ZygoteClient:
        await self._zygote_change.wait_for(lambda: self._zygote is not None)
        assert self._zygote is not None
        return self._zygote

    async def _stay_connected(self) -> None:
        """Hold a connection to whatever zygote listens at the socket."""
        while True:
            begun_s = time.monotonic()
            try:
                zygote, pid = await ZygoteClient.connect(self._socket)
            except (PlatformError, OSError, TimeoutError) as error:
                logger.debug("no zygote yet: %s", error)
            else:
                await self._follow(zygote, pid)
            spent_s = time.monotonic() - begun_s
            await asyncio.sleep(max(0.0, self._timing.connect_interval_s - spent_s))

    async def _follow(self, zygote: ZygoteClient, pid: int) -> None:
        zygote.send({"verb": "list"})
        try:
            while (event := await zygote.next_event()) is not None:
                self._apply(event, zygote)
            logger.warning("the connection to zygote %d ended", pid)
        finally:
            self._zygote = None
            self._lose_all(f"the connection to zygote {pid} ended")
            await zygote.close()

    def _read_back(self, sandboxes: Sequence[Any], zygote: ZygoteClient) -> None:
        for found in sandboxes:
            match found:
                case {"id": str(name), "pid": int(pid), "address": str(address), "config": config}:
                    self._add(Sandbox(name, address, False, _digest(config), pid))
                case _:
                    logger.error("the zygote listed %r, expected id, pid, address, config", found)
        self._zygote = zygote
        self._zygote_change.notify()

    def _apply(self, event: Mapping[str, Any], zygote: ZygoteClient) -> None:
        match event:
            case {"event": "spawned", "id": str(name), "pid": int(pid), "address": str(address)}:
                self._spawned(name, pid, address, zygote)
            case {"event": "sandboxes", "sandboxes": list(sandboxes)}:
                self._read_back(sandboxes, zygote)
            case {"event": "exited", "id": str(name), "status": int(status)}:
                self._stop_probe(name)
                self._roster.remove(name, reason=f"ended with status {status}")
            case {"event": "refused", "id": name, "message": str(message)}:
                self._refused(name, message)
            case _:
                logger.error("the zygote reported %r, which is no event", event)

    def _spawned(self, name: str, pid: int, address: str, zygote: ZygoteClient) -> None:
        starting = self._starting.get(name)
        if starting is None or starting.sandbox.done():  # nobody waits for it any more
            zygote.send({"verb": "kill", "id": name, "grace_s": 0})
            return
        sandbox = Sandbox(name, address, False, starting.template.digest, pid)
        self._add(sandbox)
        starting.sandbox.set_result(sandbox)

    def _add(self, sandbox: Sandbox) -> None:
        self._roster.put(sandbox)
        self._probes[sandbox.id] = asyncio.create_task(self._probe(sandbox))

    def _refused(self, name: Any, message: str) -> None:
        starting = self._starting.get(name)
        if starting is not None and not starting.sandbox.done():
            starting.sandbox.set_exception(PlatformError(f"sandbox {name}: {message}"))
        else:
            logger.info("the zygote refused a command for %s: %s", name, message)

    def _lose_all(self, reason: str) -> None:
        for name in list(self._probes):
            self._stop_probe(name)
        for sandbox in self._roster.all():
            self._roster.remove(sandbox.id, reason=reason)
        for starting in self._starting.values():
            if not starting.sandbox.done():
                starting.sandbox.set_exception(PlatformError(reason))

    def _stop_probe(self, name: str) -> None:
        if probe := self._probes.pop(name, None):
            probe.cancel()

    async def _probe(self, sandbox: Sandbox) -> None:
        """Ask a sandbox until it says that it is ready."""
        while True:
            if await self._answers_ready(sandbox.address):
                break
            await asyncio.sleep(self._timing.probe_interval_s)
        self._probes.pop(sandbox.id)
        self._roster.put(replace(sandbox, ready=True))

    async def _answers_ready(self, address: str) -> bool:
        try:
            async with self._http.get(f"http://{address}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


def _digest(config: Any) -> str:
    """Return the hash of the template that these settings are of; none is of any other's."""
    try:
        return SandboxTemplate(**config).digest
    except TypeError:
        return ""
