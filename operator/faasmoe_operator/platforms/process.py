"""The process platform: sandboxes are processes of this machine, forked from a zygote.

Knows nothing of functions. All sandboxes end with the zygote, and the zygote with this process; a
zygote that ended is replaced, its sandboxes are reported as gone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import aiohttp

from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent, SandboxTemplate
from faasmoe_operator.platforms.roster import Change, Roster
from faasmoe_operator.platforms.zygote import COMMAND, Zygote

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How often, and how long.

    Attributes:
        create_timeout_s: for a sandbox to get an address, the zygote's start included.
        probe_interval_s: between two readiness probes of a sandbox that is not ready.
        probe_timeout_s: for the answer to one probe.
        grace_s: for a deleted sandbox to finish, before it is killed.
        restart_delays_s: before a zygote that ended is replaced; the last one repeats.
    """

    create_timeout_s: float = 120.0
    probe_interval_s: float = 0.05
    probe_timeout_s: float = 1.0
    grace_s: float = 5.0
    restart_delays_s: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)


@dataclass(slots=True)
class _Starting:
    template: SandboxTemplate
    sandbox: asyncio.Future[Sandbox]


class ProcessPlatform:
    """Runs sandboxes as local processes; use as an async context manager in the main thread."""

    def __init__(
        self,
        *,
        token: str,
        log: Callable[[str], None] = logger.info,
        timing: Timing | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._token = token
        self._log = log
        self._timing = timing or Timing()
        self._command = command
        self._zygote: Zygote | None = None
        self._failure = ""
        self._zygote_change = Change()
        self._roster = Roster()
        self._starting: dict[str, _Starting] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        """Start the zygote in the background; the first create waits for it."""
        timeout = aiohttp.ClientTimeout(total=self._timing.probe_timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout)
        self._supervisor = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every sandbox and the zygote."""
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._http.close()

    @property
    def zygote_pid(self) -> int | None:
        """The process id of the zygote that runs."""
        return self._zygote.pid if self._zygote else None

    async def create(self, template: SandboxTemplate) -> Sandbox:
        """Fork a sandbox: it has an address at once and gets ready later; raises PlatformError."""
        name = f"s{secrets.token_hex(4)}"
        try:
            async with asyncio.timeout(self._timing.create_timeout_s):
                zygote = await self._running_zygote()
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

    async def _running_zygote(self) -> Zygote:
        await self._zygote_change.wait_for(lambda: bool(self._zygote or self._failure))
        if self._zygote is None:
            raise PlatformError(self._failure)
        return self._zygote

    async def _supervise(self) -> None:
        """Keep a zygote running; those who create while none can be started are told why."""
        failures = 0
        while True:
            try:
                zygote = await Zygote.start(self._command, token=self._token, log=self._log)
            except (PlatformError, OSError) as error:
                self._failure = f"no zygote can be started: {error}"
                self._zygote_change.notify()
                failures += 1
            else:
                failures = 0
                await self._follow(zygote)
            delays_s = self._timing.restart_delays_s
            await asyncio.sleep(delays_s[min(failures, len(delays_s) - 1)])

    async def _follow(self, zygote: Zygote) -> None:
        self._zygote, self._failure = zygote, ""
        self._zygote_change.notify()
        reason = "the platform ended"
        try:
            while (event := await zygote.next_event()) is not None:
                self._apply(event, zygote)
            reason = await zygote.ended()
            logger.error("%s; it is replaced", reason)
        finally:
            self._zygote = None
            self._lose_all(reason)
            await zygote.close()

    def _apply(self, event: Mapping[str, Any], zygote: Zygote) -> None:
        match event:
            case {"event": "spawned", "id": str(name), "pid": int(pid), "address": str(address)}:
                self._spawned(name, pid, address, zygote)
            case {"event": "exited", "id": str(name), "status": int(status)}:
                self._stop_probe(name)
                self._roster.remove(name, reason=f"ended with status {status}")
            case {"event": "refused", "id": name, "message": str(message)}:
                self._refused(name, message)
            case _:
                logger.error("the zygote reported %r, expected spawned, exited or refused", event)

    def _spawned(self, name: str, pid: int, address: str, zygote: Zygote) -> None:
        starting = self._starting.get(name)
        if starting is None or starting.sandbox.done():  # nobody waits for it any more
            zygote.send({"verb": "kill", "id": name, "grace_s": 0})
            return
        sandbox = Sandbox(name, address, False, starting.template.digest, pid)
        self._roster.put(sandbox)
        self._probes[name] = asyncio.create_task(self._probe(sandbox))
        starting.sandbox.set_result(sandbox)

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
            await asyncio.sleep(self._timing.probe_interval_s)
            if await self._answers_ready(sandbox.address):
                break
        self._probes.pop(sandbox.id)
        self._roster.put(replace(sandbox, ready=True))

    async def _answers_ready(self, address: str) -> bool:
        try:
            async with self._http.get(f"http://{address}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
