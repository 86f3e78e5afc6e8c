"""The zygote: imports the sandbox runtime once and forks sandboxes that share its pages.

A client connects to a Unix socket (FAASMOE_ZYGOTE_SOCKET), sends commands and receives events, both
as JSON lines. A new client replaces the previous one. Events sent while there is no client are
lost, so a new client asks for the list of sandboxes:

    {"verb": "spawn", "id": "s1", "config": {"capacity": 1}}   fields of SandboxConfig
    {"verb": "kill", "id": "s1", "grace_s": 5}                 SIGTERM, then SIGKILL after grace_s
    {"verb": "list"}

    {"event": "ready", "pid": 7}                               the first line of each connection
    {"event": "spawned", "id": "s1", "pid": 8, "address": "127.0.0.1:4242"}
    {"event": "exited", "id": "s1", "pid": 8, "status": 0}     negative: killed by this signal
    {"event": "sandboxes", "sandboxes": [{"id": .., "pid": .., "address": .., "config": ..}]}
    {"event": "refused", "id": "s2", "message": "..."}

The zygote outlives its clients. It exits on SIGTERM or when its parent dies, and its sandboxes die
with it. The token is read from the environment (FAASMOE_TOKEN), never from a command. The zygote
never runs an OpenMP region, because children forked after one hang in their first region.
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
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_expert.malloc import HOLES
from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, defer_import
from faasmoe_transformers.version_check import SANDBOX_MODULES, check_private_names

logger = logging.getLogger(__name__)

SOCKET_ENV = "FAASMOE_ZYGOTE_SOCKET"
WARMUP_STORE_ENV = "FAASMOE_WARMUP_STORE"
HOST = "127.0.0.1"
LISTEN_BACKLOG = 128  # of a sandbox's socket
CLIENT_BACKLOG = 4  # of the zygote's socket
MAX_LINE_BYTES = 1 << 16
SEND_TIMEOUT_S = 2.0
DEFAULT_GRACE_S = 5.0
SHUTDOWN_GRACE_S = 5.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(process)d %(message)s"
_HANDLED_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

ServeSandbox = Callable[[dict[str, Any], socket.socket], None]
"""Runs a sandbox with these SandboxConfig fields on a listening socket, until SIGTERM."""


class ControlChannel:
    """Unix socket server for JSON lines that serves one client, the latest.

    Args:
        path: path of the socket; a stale socket of an earlier process is replaced.
        selector: selector of the main loop; its keys carry a callback as data.
        greeting: first event sent to each client.
        on_line: called with each line from the client.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        *,
        greeting: dict[str, Any],
        on_line: Callable[[bytes], None],
    ) -> None:
        self._selector = selector
        self._greeting = greeting
        self._on_line = on_line
        self._client: socket.socket | None = None
        self._buffer = b""
        # Renamed only once it listens, so that a socket at `path` always accepts connections.
        temporary_path = path.with_name(f"{path.name}~")
        temporary_path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(temporary_path))
        temporary_path.chmod(0o600)
        self._listener.listen(CLIENT_BACKLOG)
        self._listener.setblocking(False)
        temporary_path.replace(path)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def send_event(self, event: dict[str, Any]) -> None:
        """Send an event to the client, if any; disconnects a client that does not read."""
        if self._client is None:
            return
        try:
            self._client.sendall(json.dumps(event).encode() + b"\n")
        except OSError as error:
            logger.warning("zygote client disconnected: %s", error)
            self._drop_client()

    def close(self) -> None:
        """Stop listening and disconnect the client."""
        self._selector.unregister(self._listener)
        self._listener.close()
        self._drop_client()

    def close_inherited(self) -> None:
        """Close the descriptors in a forked child without affecting the zygote's."""
        for inherited in (self._listener, self._client):
            if inherited is not None:
                os.close(inherited.detach())
        self._client = None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the client disconnected already
            return
        self._drop_client()
        client.settimeout(SEND_TIMEOUT_S)
        self._client, self._buffer = client, b""
        self._selector.register(client, selectors.EVENT_READ, partial(self._read, client))
        self.send_event(self._greeting)

    def _read(self, client: socket.socket) -> None:
        if client is not self._client:  # replaced during this poll
            return
        try:
            chunk = client.recv(MAX_LINE_BYTES)
        except OSError:
            chunk = b""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if not chunk or len(self._buffer) > MAX_LINE_BYTES:
            self._drop_client()
        for line in lines:
            self._on_line(line)

    def _drop_client(self) -> None:
        if self._client is not None:
            self._selector.unregister(self._client)
            self._client.close()
        self._client, self._buffer = None, b""


class NotSingleThreaded(RuntimeError):
    """The process has other threads; a forked child would deadlock on the locks they hold."""


class InvalidCommand(ValueError):
    """A command that cannot be executed; the message says why."""


@dataclass(slots=True)
class _ChildSandbox:
    id: str
    pid: int
    address: str
    config: dict[str, Any]
    kill_at_s: float | None = None  # on the monotonic clock


class Zygote:
    """Forks, monitors and stops sandboxes. Must run in the main thread of a one-thread process."""

    def __init__(self, serve_sandbox: ServeSandbox, socket_path: Path) -> None:
        self._serve_sandbox = serve_sandbox
        self._socket_path = socket_path
        self._children: dict[int, _ChildSandbox] = {}
        self._is_shutting_down = False

    def run(self) -> None:
        """Serve clients until SIGTERM, then stop all sandboxes."""
        with (
            _open_signal_pipe() as self._signal_pipe,
            selectors.DefaultSelector() as self._selector,
        ):
            self._selector.register(self._signal_pipe[0], selectors.EVENT_READ, self._read_signals)
            self._channel = ControlChannel(
                self._socket_path,
                self._selector,
                greeting={"event": "ready", "pid": os.getpid()},
                on_line=self._handle_command,
            )
            while not self._is_shutting_down:
                self._poll_once()
            for child in self._children.values():
                self._terminate(child, SHUTDOWN_GRACE_S)
            while self._children:
                self._poll_once()
            self._channel.close()

    def _poll_once(self) -> None:
        deadlines = [c.kill_at_s for c in self._children.values() if c.kill_at_s is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout_s):
            key.data()
        self._reap_exited()
        self._kill_after_grace(time.monotonic())

    def _read_signals(self) -> None:
        if set(os.read(self._signal_pipe[0], 4096)) - {signal.SIGCHLD}:
            self._is_shutting_down = True

    def _handle_command(self, line: bytes) -> None:
        command: Any = None
        try:
            command = json.loads(line)
            match command:
                case {"verb": "spawn", "id": str(name), "config": dict(config)}:
                    self._spawn(name, config)
                case {"verb": "kill", "id": str(name)}:
                    grace_s = float(command.get("grace_s", DEFAULT_GRACE_S))
                    self._terminate(self._find_child(name), grace_s)
                case {"verb": "list"}:
                    self._send_sandbox_list()
                case _:
                    raise InvalidCommand(
                        "got an unknown verb or fields, expected spawn, kill, list"
                    )
        except (ValueError, TypeError, OSError) as error:
            command_id = command.get("id") if isinstance(command, dict) else None
            self._channel.send_event({"event": "refused", "id": command_id, "message": str(error)})

    def _send_sandbox_list(self) -> None:
        sandboxes = [
            {"id": c.id, "pid": c.pid, "address": c.address, "config": c.config}
            for c in self._children.values()
        ]
        self._channel.send_event({"event": "sandboxes", "sandboxes": sandboxes})

    def _find_child(self, name: str) -> _ChildSandbox:
        for child in self._children.values():
            if child.id == name:
                return child
        raise InvalidCommand(f"id: got {name!r}, expected a running sandbox")

    def _spawn(self, name: str, config: dict[str, Any]) -> None:
        if self._is_shutting_down:
            raise InvalidCommand("the zygote is shutting down")
        if any(child.id == name for child in self._children.values()):
            raise InvalidCommand(f"id: {name!r} is already running")
        # Bound here, not in the child, so that the address is known immediately.
        with socket.create_server((HOST, 0), backlog=LISTEN_BACKLOG) as listener:
            port = listener.getsockname()[1]
            fields = {**config, "id": name, "host": HOST, "port": port}
            pid = self._fork(fields, listener)
        address = f"{HOST}:{port}"
        self._children[pid] = _ChildSandbox(name, pid, address, config)
        self._channel.send_event({"event": "spawned", "id": name, "pid": pid, "address": address})

    def _fork(self, fields: dict[str, Any], listener: socket.socket) -> int:
        zygote_pid = os.getpid()
        # Signals are blocked, so that the child never runs the zygote's handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._run_sandbox(zygote_pid, fields, listener)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED_SIGNALS)
        return pid

    def _run_sandbox(
        self, zygote_pid: int, fields: dict[str, Any], listener: socket.socket
    ) -> NoReturn:
        status = 1
        try:
            die_with_parent(zygote_pid)
            self._drop_inherited()
            self._serve_sandbox(fields, listener)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # outermost frame of the child: report any error, then exit
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _drop_inherited(self) -> None:
        """Reset signal handlers, descriptors and GC settings inherited from the zygote."""
        signal.set_wakeup_fd(-1)
        for number in _HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED_SIGNALS)
        self._selector.close()
        for descriptor in self._signal_pipe:
            os.close(descriptor)
        self._channel.close_inherited()
        gc.enable()

    def _terminate(self, child: _ChildSandbox, grace_s: float) -> None:
        os.kill(child.pid, signal.SIGTERM)  # not reaped yet, so the pid is not reused
        deadline_s = time.monotonic() + grace_s
        child.kill_at_s = min(deadline_s, child.kill_at_s or deadline_s)

    def _kill_after_grace(self, now_s: float) -> None:
        for child in self._children.values():
            if child.kill_at_s is not None and child.kill_at_s <= now_s:
                os.kill(child.pid, signal.SIGKILL)
                child.kill_at_s = None

    def _reap_exited(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            self._channel.send_event(
                {"event": "exited", "id": child.id, "pid": pid, "status": code}
            )


@contextmanager
def _open_signal_pipe() -> Iterator[tuple[int, int]]:
    """Write the number of each handled signal to a pipe; yields (read end, write end)."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    for number in _HANDLED_SIGNALS:
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    try:
        yield ends
    finally:
        signal.set_wakeup_fd(-1)
        for end in ends:
            os.close(end)


def import_runtime() -> ServeSandbox:
    """Import the sandbox runtime, torch included, and warm it up if a store is configured.

    Returns:
        The function that serves a sandbox in a forked child.

    Raises:
        NotSingleThreaded: the warm-up started threads.
        UnsupportedVersions: torch lacks a private name that a sandbox uses.
        SandboxConfigError: a setting in the environment is invalid.
    """
    defer_import(META_REGISTRATIONS)
    from faasmoe_expert.config import SandboxConfig
    from faasmoe_expert.server.server import serve
    from faasmoe_expert.warmup import warm_up

    check_private_names(SANDBOX_MODULES, libraries=("torch",))
    base = SandboxConfig.from_env()
    if path := os.environ.get(WARMUP_STORE_ENV, ""):
        warm_up(base, Path(path))
        _check_single_threaded()
    return lambda fields, listener: serve(replace(base, **fields), listener)


def _check_single_threaded() -> None:
    n_threads = len(os.listdir("/proc/self/task"))
    if n_threads > 1:
        raise NotSingleThreaded(f"warm-up: got {n_threads} threads after warm-up, expected one")


def main(import_sandbox: Callable[[], ServeSandbox] = import_runtime) -> int:
    """Run the zygote until SIGTERM; return the exit status.

    Args:
        import_sandbox: imports the runtime and returns the function that serves a sandbox.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    path = os.environ.get(SOCKET_ENV, "")
    if not path:
        print(f"{SOCKET_ENV}: not set, expected the path of a socket", file=sys.stderr)
        return 2
    try:
        die_with_parent()
        phases = StartPhases()
        gc.disable()  # collecting while importing takes time and frees nothing
        zygote = Zygote(import_sandbox(), Path(path))
        # Children's collectors skip frozen objects, so their pages stay shared.
        gc.collect()
        HOLES.fill()
        gc.freeze()
        phases.end("imports and warm up")
        logger.info("%s", phases.describe())
        zygote.run()
    except (ParentDeathError, NotSingleThreaded, UnsupportedVersions, OSError, ValueError) as error:
        print(f"faasmoe_expert.zygote: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
