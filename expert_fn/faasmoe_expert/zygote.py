"""The zygote: a process that has imported the sandbox runtime once and forks sandboxes from it.

It computes nothing itself: a parent that has run one OpenMP region leaves children that hang in
their first. A client connects to its unix socket (FAASMOE_ZYGOTE_SOCKET), sends commands as JSON
lines and gets events as JSON lines; a new client takes the place of the one before:

    {"verb": "spawn", "id": "s1", "config": {"capacity": 1}}   fields of SandboxConfig
    {"verb": "kill", "id": "s1", "grace_s": 5}                 SIGTERM, after the grace SIGKILL
    {"verb": "list"}

    {"event": "ready", "pid": 7}                               the first line of each connection
    {"event": "spawned", "id": "s1", "pid": 8, "address": "127.0.0.1:4242"}
    {"event": "exited", "id": "s1", "pid": 8, "status": 0}     negative: the signal that ended it
    {"event": "sandboxes", "sandboxes": [{"id": .., "pid": .., "address": .., "config": ..}]}
    {"event": "refused", "id": "s2", "message": "..."}

It outlives its clients. SIGTERM or its parent's end ends it, and the sandboxes end with it in any
case. The token comes by the environment (FAASMOE_TOKEN), never by a command.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from faasmoe_expert.deferral import META_KERNELS, defer_import
from faasmoe_expert.lifeline import LifelineError, die_with_parent
from faasmoe_expert.zygote_channel import Channel

Serve = Callable[[dict[str, Any], socket.socket], None]
"""Runs a sandbox with these config fields on a listening socket, until SIGTERM."""

SOCKET_VARIABLE = "FAASMOE_ZYGOTE_SOCKET"
REHEARSAL_VARIABLE = "FAASMOE_REHEARSAL_STORE"
HOST = "127.0.0.1"
BACKLOG = 128
DEFAULT_GRACE_S = 5.0
ENDING_GRACE_S = 5.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(process)d %(message)s"
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class NotAlone(RuntimeError):
    """There are other threads: whatever they hold or wait for, a child would wait for ever."""


class CommandRefused(ValueError):
    """A command that cannot be carried out; the message says why."""


@dataclass(slots=True)
class _Child:
    id: str
    pid: int
    address: str
    config: dict[str, Any]
    kill_at_s: float | None = None  # on the monotonic clock


class Zygote:
    """Forks, watches and ends sandboxes. Must run in the main thread, as the only thread."""

    def __init__(self, serve: Serve, socket_path: Path) -> None:
        self._serve = serve
        self._socket_path = socket_path
        self._children: dict[int, _Child] = {}
        self._ending = False

    def run(self) -> None:
        """Serve clients until SIGTERM, then end every sandbox."""
        with _signal_pipe() as self._signals, selectors.DefaultSelector() as self._selector:
            self._selector.register(self._signals[0], selectors.EVENT_READ, self._read_signals)
            self._channel = Channel(
                self._socket_path,
                self._selector,
                greeting={"event": "ready", "pid": os.getpid()},
                obey=self._obey,
            )
            while not self._ending:
                self._turn()
            for child in self._children.values():
                self._terminate(child, ENDING_GRACE_S)
            while self._children:
                self._turn()
            self._channel.close()

    def _turn(self) -> None:
        deadlines = [c.kill_at_s for c in self._children.values() if c.kill_at_s is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout_s):
            key.data()
        self._reap()
        self._kill_overdue(time.monotonic())

    def _read_signals(self) -> None:
        if set(os.read(self._signals[0], 4096)) - {signal.SIGCHLD}:
            self._ending = True

    def _obey(self, line: bytes) -> None:
        command: Any = None
        try:
            command = json.loads(line)
            match command:
                case {"verb": "spawn", "id": str(name), "config": dict(config)}:
                    self._spawn(name, config)
                case {"verb": "kill", "id": str(name)}:
                    grace_s = float(command.get("grace_s", DEFAULT_GRACE_S))
                    self._terminate(self._child_named(name), grace_s)
                case {"verb": "list"}:
                    self._list()
                case _:
                    raise CommandRefused(
                        "got an unknown verb or fields, expected spawn, kill, list"
                    )
        except (ValueError, TypeError, OSError) as error:
            refused = command.get("id") if isinstance(command, dict) else None
            self._channel.emit({"event": "refused", "id": refused, "message": str(error)})

    def _list(self) -> None:
        sandboxes = [
            {"id": c.id, "pid": c.pid, "address": c.address, "config": c.config}
            for c in self._children.values()
        ]
        self._channel.emit({"event": "sandboxes", "sandboxes": sandboxes})

    def _child_named(self, name: str) -> _Child:
        for child in self._children.values():
            if child.id == name:
                return child
        raise CommandRefused(f"id: got {name!r}, expected a sandbox that runs")

    def _spawn(self, name: str, config: dict[str, Any]) -> None:
        if self._ending:
            raise CommandRefused("the zygote is ending")
        if any(child.id == name for child in self._children.values()):
            raise CommandRefused(f"id: got {name!r}, which runs already")
        # The address is known at once because the listener is bound here, not in the child.
        with socket.create_server((HOST, 0), backlog=BACKLOG) as listener:
            port = listener.getsockname()[1]
            fields = {**config, "id": name, "host": HOST, "port": port}
            pid = self._fork(fields, listener)
        address = f"{HOST}:{port}"
        self._children[pid] = _Child(name, pid, address, config)
        self._channel.emit({"event": "spawned", "id": name, "pid": pid, "address": address})

    def _fork(self, fields: dict[str, Any], listener: socket.socket) -> int:
        zygote_pid = os.getpid()
        # Blocked, so that a signal to the child never runs the zygote's handlers in it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_sandbox(zygote_pid, fields, listener)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return pid

    def _become_sandbox(
        self, zygote_pid: int, fields: dict[str, Any], listener: socket.socket
    ) -> NoReturn:
        status = 1
        try:
            die_with_parent(zygote_pid)
            self._let_go()
            self._serve(fields, listener)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # the last frame of this process: whatever it was, say it and end
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _let_go(self) -> None:
        """Drop in a child what belongs to the zygote: its handlers, its sockets, its garbage."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._selector.close()
        for descriptor in self._signals:
            os.close(descriptor)
        self._channel.let_go()
        gc.enable()

    def _terminate(self, child: _Child, grace_s: float) -> None:
        os.kill(child.pid, signal.SIGTERM)  # not reaped yet, so the id cannot be another's
        deadline_s = time.monotonic() + grace_s
        child.kill_at_s = min(deadline_s, child.kill_at_s or deadline_s)

    def _kill_overdue(self, now_s: float) -> None:
        for child in self._children.values():
            if child.kill_at_s is not None and child.kill_at_s <= now_s:
                os.kill(child.pid, signal.SIGKILL)
                child.kill_at_s = None

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            self._channel.emit({"event": "exited", "id": child.id, "pid": pid, "status": code})


@contextmanager
def _signal_pipe() -> Iterator[tuple[int, int]]:
    """Make signals readable: each writes its number into a pipe; gives (read end, write end)."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    for number in _SIGNALS:
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    try:
        yield ends
    finally:
        signal.set_wakeup_fd(-1)
        for end in ends:
            os.close(end)


def import_runtime() -> Serve:
    """Import all that a sandbox needs, torch included, and return what runs one."""
    defer_import(META_KERNELS)
    from faasmoe_expert.config import SandboxConfig
    from faasmoe_expert.rehearsal import rehearse
    from faasmoe_expert.server import serve

    base = SandboxConfig.from_env()
    if path := os.environ.get(REHEARSAL_VARIABLE, ""):
        rehearse(base, Path(path))
        _check_alone()
    return lambda fields, listener: serve(replace(base, **fields), listener)


def _check_alone() -> None:
    n_threads = len(os.listdir("/proc/self/task"))
    if n_threads > 1:
        raise NotAlone(f"rehearsal: got {n_threads} threads in the end, expected one")


def main(load: Callable[[], Serve] = import_runtime) -> int:
    """Run the zygote until SIGTERM.

    Args:
        load: imports the runtime and returns what serves a sandbox.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    path = os.environ.get(SOCKET_VARIABLE, "")
    if not path:
        print(f"{SOCKET_VARIABLE}: not set, expected the path of a socket", file=sys.stderr)
        return 2
    try:
        die_with_parent()
        zygote = Zygote(load(), Path(path))
        # What is frozen is not visited by a child's collector, so its pages stay shared.
        gc.disable()
        gc.collect()
        gc.freeze()
        zygote.run()
    except (LifelineError, NotAlone, OSError, ValueError) as error:
        print(f"faasmoe_expert.zygote: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
