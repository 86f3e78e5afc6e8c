"""A zygote of this launcher: a child process that has imported everything and forks others.

The protocol is `faasmoe_contracts.fork_server`. The zygote starts with its first child, and again
if it has died, which its children do not survive unless this process has adopted them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from faasmoe_contracts.fork_server import (
    FORK_FD_ENV,
    MAX_PACKET_BYTES,
    ForkRequest,
    adopting_orphans,
    send_signal,
)
from faasmoe_operator.aio import MAX_LINE_BYTES
from faasmoe_operator.cli.child_process import (
    ChildNotStarted,
    ChildProcess,
    RunChild,
    running_child,
)


class ForkedProcess:
    """A process that a zygote has forked, with the interface of asyncio's processes.

    Args:
        pid: process id.
        stdout: its output.
        send_signal: sends it a signal; may raise OSError once it has ended.
    """

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, send_signal: Callable[[int], None]
    ) -> None:
        self._pid = pid
        self._stdout = stdout
        self._send = send_signal
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._pid

    @property
    def stdout(self) -> asyncio.StreamReader:
        """Its output."""
        return self._stdout

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs, -N if signal N killed it."""
        return self._status.result() if self._status.done() else None

    async def wait(self) -> int:
        """Wait for its exit; return its status."""
        return await asyncio.shield(self._status)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send_signal(signal.SIGKILL)

    def set_status(self, status: int) -> None:
        """Record that it has exited."""
        if not self._status.done():
            self._status.set_result(status)

    def _send_signal(self, number: int) -> None:
        if self._status.done():
            return
        with contextlib.suppress(OSError):  # the zygote is gone, and its children with it
            self._send(number)


def adopted_process(pid: int, stdout: asyncio.StreamReader) -> ForkedProcess:
    """Return a process that a zygote has forked and this process has adopted; waits for its end."""
    child, loop = ForkedProcess(pid, stdout, partial(os.kill, pid)), asyncio.get_running_loop()
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:  # not adopted, as nobody waited for it any more
        child.set_status(-signal.SIGKILL)
        return child

    def reap() -> None:
        loop.remove_reader(ended)
        os.close(ended)
        try:
            child.set_status(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        except ChildProcessError:
            child.set_status(-signal.SIGKILL)

    loop.add_reader(ended, reap)
    return child


class Zygote:
    """Forks children; use it as an async context manager.

    Args:
        name: name for messages.
        command: command line of the zygote.
        environment: its complete environment.
        log: called with each line that it writes.
        grace_s: seconds between SIGTERM and SIGKILL at the end of the context.
        run: runs the zygote for the lifetime of a context.
        gives_away: whether its children become this process's, as `ForkServer` says.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Callable[[str], None],
        grace_s: float,
        run: RunChild = running_child,
        gives_away: bool = False,
    ) -> None:
        self._name = name
        self._command = command
        self._environment = environment
        self._log = log
        self._grace_s = grace_s
        self._run = run
        self._gives_away = gives_away
        self._running: _RunningZygote | None = None
        self._stack = AsyncExitStack()
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Process id; None unless it runs."""
        if self._running is None or self._running.has_ended:
            return None
        return self._running.process.pid

    async def __aenter__(self) -> Zygote:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def running_child(
        self,
        environment: Mapping[str, str],
        *,
        log: Callable[[str], None],
        grace_s: float,
        pass_fds: Sequence[int] = (),
    ) -> AsyncIterator[ChildProcess]:
        """Run a forked child for the lifetime of the context.

        Args:
            environment: the complete environment of the child.
            log: called with each output line.
            grace_s: seconds between SIGTERM and SIGKILL.
            pass_fds: descriptors that the child inherits, under the same numbers.

        Raises:
            ChildNotStarted: the zygote has ended before it forked the child.
        """
        zygote = await self._ensure_running()
        child = ChildProcess(await zygote.fork(ForkRequest(environment, tuple(pass_fds))), log)
        try:
            yield child
        finally:
            await child.stop(grace_s=grace_s)

    async def _ensure_running(self) -> _RunningZygote:
        async with self._starting:
            if self._running is None or self._running.has_ended:
                await self._stack.aclose()
                self._running = await self._stack.enter_async_context(self._start())
            return self._running

    @asynccontextmanager
    async def _start(self) -> AsyncIterator[_RunningZygote]:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, its:
            async with self._run(
                self._command,
                environment={**self._environment, FORK_FD_ENV: str(its.fileno())},
                log=self._log,
                grace_s=self._grace_s,
                pass_fds=(its.fileno(),),
            ) as process:
                its.close()
                running = _RunningZygote(self._name, process, ours, gives_away=self._gives_away)
                try:
                    yield running
                finally:
                    running.close()


class _RunningZygote:
    """A running zygote's process and the launcher's end of its socket.

    Attributes:
        process: the process.
        has_ended: whether it has closed its end, and so forks no more.
    """

    def __init__(
        self, name: str, process: ChildProcess, channel: socket.socket, *, gives_away: bool
    ) -> None:
        self.process = process
        self.has_ended = False
        self._gives_away = gives_away
        self._adopting = asyncio.Lock()
        self._name = name
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._requested: deque[tuple[asyncio.Future[ForkedProcess], asyncio.StreamReader]] = deque()
        self._children: dict[int, ForkedProcess] = {}
        channel.setblocking(False)
        self._loop.add_reader(channel, self._read)

    async def fork(self, request: ForkRequest) -> ForkedProcess:
        """Return a new child; raises ChildNotStarted if the zygote has ended."""
        if not self._gives_away:
            return await self._fork(request)
        async with self._adopting:
            with adopting_orphans():
                return await self._fork(request)

    async def _fork(self, request: ForkRequest) -> ForkedProcess:
        output, its_output = os.pipe()
        stdout = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(output, "rb", buffering=0)
        )
        forked: asyncio.Future[ForkedProcess] = self._loop.create_future()
        self._requested.append((forked, stdout))
        try:
            request.send(self._channel, its_output)
        except OSError:
            self._on_end()
        finally:
            os.close(its_output)
        try:
            return await forked
        except _ZygoteEnded:
            reason = await self.process.describe_exit()
            raise ChildNotStarted(f"was not started: the {self._name} {reason}") from None

    def close(self) -> None:
        """Stop reading; what is left of the children ends with the zygote."""
        self._loop.remove_reader(self._channel)
        self._on_end()

    def _read(self) -> None:
        try:
            packet = self._channel.recv(MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
            return
        match json.loads(packet):
            case {"forked": int(pid)}:
                self._on_forked(pid)
            case {"exited": int(pid), "status": int(status)}:
                self._children.pop(pid).set_status(status)

    def _on_forked(self, pid: int) -> None:
        forked, stdout = self._requested.popleft()
        if self._gives_away:
            child = adopted_process(pid, stdout)
        else:
            child = ForkedProcess(pid, stdout, partial(send_signal, self._channel, pid))
            self._children[pid] = child
        if forked.cancelled():  # whoever wanted it has left meanwhile
            child.kill()
        else:
            forked.set_result(child)

    def _on_end(self) -> None:
        self.has_ended = True
        while self._requested:
            forked, _ = self._requested.popleft()
            if not forked.done():
                forked.set_exception(_ZygoteEnded())
        for child in self._children.values():
            child.set_status(-signal.SIGKILL)  # as the kernel does when the zygote ends
        self._children.clear()


class _ZygoteEnded(Exception):
    """The zygote has ended before it forked a child."""
