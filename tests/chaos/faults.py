"""Injects faults into processes, connections and files of a chaos stack."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import psutil
from tests.chaos.proxies import SandboxProxy
from tests.chaos.schedule import Fault, FaultKind
from tests.chaos.stack import ChaosStack

HEADROOM_BYTES = 8 << 20  # what a sandbox with a memory limit may still allocate
MAX_DELAY_S = 0.2
MAX_STOPPED_S = 6.0
MAX_REWRITE_S = 0.3
ROUTER_START_S = 10.0


class FaultInjector:
    """Injects faults into one stack; temporary faults are undone after their time or by `close`."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        self._pending_undos: set[asyncio.Task[None]] = set()
        self._actions: Mapping[FaultKind, Callable[[Fault], Awaitable[str]]] = {
            FaultKind.KILL_SANDBOX: self._kill_sandbox,
            FaultKind.STOP_SANDBOX: self._stop_sandbox,
            FaultKind.DELAY: self._delay,
            FaultKind.CUT: self._cut,
            FaultKind.FLIP_REQUEST: self._flip_request,
            FaultKind.FLIP_ANSWER: self._flip_answer,
            FaultKind.FLIP_STORE: self._flip_store,
            FaultKind.LIMIT_MEMORY: self._limit_memory,
            FaultKind.FILL_DISK: self._fill_disk,
            FaultKind.KILL_CONTROL: self._kill_control,
            FaultKind.STOP_CONTROL: self._stop_control,
            FaultKind.KILL_ZYGOTE: self._kill_zygote,
            FaultKind.KILL_ROUTER: self._kill_router,
            FaultKind.STORE_AWAY: self._store_away,
            FaultKind.REWRITE_STORE: self._rewrite_store,
        }

    async def inject(self, fault: Fault) -> str:
        """Inject a fault; return its target, or an empty string if there was none."""
        try:
            return await self._actions[fault.kind](fault)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return ""

    async def close(self) -> None:
        """Undo all temporary faults."""
        for task in self._pending_undos:
            task.cancel()
        await asyncio.gather(*self._pending_undos, return_exceptions=True)

    def _choose_sandbox(self, fault: Fault) -> SandboxProxy | None:
        sandboxes = sorted(self._stack.proxy.sandboxes.items())
        return sandboxes[fault.choice % len(sandboxes)][1] if sandboxes else None

    def _undo_later(self, undo: Callable[[], None], after_s: float) -> None:
        async def wait() -> None:
            try:
                await asyncio.sleep(after_s)
            finally:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    undo()  # fails if the process was killed meanwhile

        task = asyncio.create_task(wait())
        self._pending_undos.add(task)
        task.add_done_callback(self._pending_undos.discard)

    async def _kill_sandbox(self, fault: Fault) -> str:
        return self._signal_sandbox(fault, signal.SIGKILL)

    async def _stop_sandbox(self, fault: Fault) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        os.kill(sandbox.pid, signal.SIGSTOP)
        self._undo_later(lambda: os.kill(sandbox.pid, signal.SIGCONT), fault.lasts_s)
        return f"sandbox {sandbox.pid}"

    def _signal_sandbox(self, fault: Fault, number: int) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        os.kill(sandbox.pid, number)
        return f"sandbox {sandbox.pid}"

    async def _delay(self, fault: Fault) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        sandbox.delay(fault.place * MAX_DELAY_S, for_s=fault.lasts_s)
        return f"sandbox {sandbox.pid}"

    async def _cut(self, fault: Fault) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        sandbox.cut()
        return f"sandbox {sandbox.pid}"

    async def _flip_request(self, fault: Fault) -> str:
        return self._flip(fault, "request")

    async def _flip_answer(self, fault: Fault) -> str:
        return self._flip(fault, "answer")

    def _flip(self, fault: Fault, direction: str) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        sandbox.flip(direction, fault.place)
        return f"sandbox {sandbox.pid}"

    async def _flip_store(self, fault: Fault) -> str:
        path = self._choose_store_file(fault)
        if path is None:
            return ""
        bit = int(fault.place * 8 * path.stat().st_size)
        file = os.open(path, os.O_RDWR)  # its name may be away when the bit is flipped back
        _flip_bit(file, bit)

        def undo() -> None:
            _flip_bit(file, bit)
            os.close(file)

        self._undo_later(undo, fault.lasts_s)
        return f"{path.name} bit {bit}"

    async def _rewrite_store(self, fault: Fault) -> str:
        """Write a file of the store in place, as `cp` does: truncated, then the same bytes."""
        path = self._choose_store_file(fault)
        if path is None:
            return ""
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(0)
            await asyncio.sleep(fault.place * MAX_REWRITE_S)
            file.write(content)
        return path.name

    async def _store_away(self, fault: Fault) -> str:
        """Move the experts away for a while, as a volume that is lost."""
        folder = self._stack.store_copy / "experts"
        away = folder.with_name("experts.away")
        if away.exists():
            return ""
        folder.rename(away)

        def undo() -> None:
            away.rename(folder)

        self._undo_later(undo, fault.lasts_s)
        return folder.name

    def _choose_store_file(self, fault: Fault) -> Path | None:
        """Return a file of experts; None while they are away."""
        folder = self._stack.store_copy / "experts"
        files = sorted(folder.iterdir()) if folder.exists() else []
        return files[fault.choice % len(files)] if files else None

    async def _limit_memory(self, fault: Fault) -> str:
        sandbox = self._choose_sandbox(fault)
        if sandbox is None:
            return ""
        process = psutil.Process(sandbox.pid)
        now_bytes = process.memory_info().vms
        process.rlimit(resource.RLIMIT_AS, (now_bytes + HEADROOM_BYTES, resource.RLIM_INFINITY))
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        self._undo_later(lambda: process.rlimit(resource.RLIMIT_AS, unlimited), fault.lasts_s)
        return f"sandbox {sandbox.pid}"

    async def _fill_disk(self, fault: Fault) -> str:
        """Prevent the control process from extending any file."""
        if self._stack.control.pid is None:
            return ""
        process = psutil.Process(self._stack.control.pid)
        infinity = resource.RLIM_INFINITY
        process.rlimit(resource.RLIMIT_FSIZE, (0, infinity))
        self._undo_later(
            lambda: process.rlimit(resource.RLIMIT_FSIZE, (infinity, infinity)), fault.lasts_s
        )
        return f"control {process.pid}"

    async def _kill_control(self, fault: Fault) -> str:
        pid = self._stack.control.pid
        if pid is None:
            return ""
        os.kill(pid, signal.SIGKILL)
        return f"control {pid}"

    async def _stop_control(self, fault: Fault) -> str:
        pid = self._stack.control.pid
        if pid is None:
            return ""
        os.kill(pid, signal.SIGSTOP)
        self._undo_later(
            lambda: os.kill(pid, signal.SIGCONT), min(3 * fault.lasts_s, MAX_STOPPED_S)
        )
        return f"control {pid}"

    async def _kill_zygote(self, fault: Fault) -> str:
        pid = self._stack.zygote.pid
        if pid is None:
            return ""
        os.kill(pid, signal.SIGKILL)
        return f"zygote {pid}"

    async def _kill_router(self, fault: Fault) -> str:
        """Kill the router, unless it is starting: requests survive few deaths without progress."""
        pid = self._stack.router.pid
        if pid is None or time.time() - psutil.Process(pid).create_time() < ROUTER_START_S:
            return ""
        lost = self._stack.lost_metrics
        for name, value in (await self._stack.router_metrics()).items():
            lost[name] += value
        os.kill(pid, signal.SIGKILL)
        return f"router {pid}"


def _flip_bit(file: int, bit: int) -> None:
    if content := os.pread(file, 1, bit // 8):  # nothing while the file is rewritten
        os.pwrite(file, bytes([content[0] ^ 1 << bit % 8]), bit // 8)
