"""A process that has imported everything and forks on request, and what its launcher sends it.

Both sides of a Unix socket (SOCK_SEQPACKET) whose number is in FAASMOE_FORK_FD. Each packet is one
JSON object:

    {"environment": {"A": "b"}, "descriptors": [7]}   with the output and these descriptors attached
    {"signal": 15, "pid": 8}

    {"forked": 8}                                     answers, in the order of the requests
    {"exited": 8, "status": -9}                       negative: killed by this signal

The server ends when its launcher closes the socket, and its children die with it; or they become
children of the launcher, which then waits for them itself, and survive it. It must have one thread
when it forks: a child would wait forever for locks that other threads held.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from faasmoe_contracts.parent_death import PARENT_PID_ENV, die_with_parent

FORK_FD_ENV = "FAASMOE_FORK_FD"
FORK_MODULE_ENV = "FAASMOE_FORK_MODULE"
"""Names, in a request, the module whose `main` a child runs, if there are several."""
MAX_PACKET_BYTES = 1 << 18
MAX_DESCRIPTORS = 16
MAX_PID_DIGITS = 7
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36


class ForkServerError(RuntimeError):
    """A server that cannot serve, or a packet that is not one of the protocol."""


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """What a child is to be.

    Attributes:
        environment: its complete environment.
        descriptors: the numbers under which it gets the descriptors that come with the request.
    """

    environment: Mapping[str, str]
    descriptors: tuple[int, ...] = ()

    def send(self, channel: socket.socket, output: int) -> None:
        """Send the request with the descriptors and, ahead of them, that of stdout and stderr."""
        message = {"environment": dict(self.environment), "descriptors": list(self.descriptors)}
        socket.send_fds(channel, [json.dumps(message).encode()], [output, *self.descriptors])


def send_signal(channel: socket.socket, pid: int, number: int) -> None:
    """Have the server send a signal to a child that it has not reaped."""
    channel.send(json.dumps({"signal": number, "pid": pid}).encode())


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Have what processes leave that this one has started become its own children meanwhile."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkServer:
    """Forks children and reports their ends. Use it in the main thread of a one-thread process.

    Args:
        channel: the connected socket.
        process_name: name of the children's main thread, as `ps` shows it; 15 bytes at most.
        before_fork: called with each child's environment before it is forked, to make what the
            child will need; must start no thread.
        gives_away: whether children become those of the launcher, which adopts them
            (`adopting_orphans`); each then has a session of its own.

    Raises:
        ForkServerError: the process has other threads.
    """

    def __init__(
        self,
        channel: socket.socket,
        *,
        process_name: str,
        before_fork: Callable[[Mapping[str, str]], None] = lambda _: None,
        gives_away: bool = False,
    ) -> None:
        _check_single_threaded("the imports")
        self._gives_away = gives_away
        self._before_fork = before_fork
        self._channel = channel
        self._process_name = process_name
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._pids: dict[int, int] = {}  # by the descriptor that tells of their end

    @classmethod
    def from_environment(
        cls,
        *,
        process_name: str,
        before_fork: Callable[[Mapping[str, str]], None] = lambda _: None,
        gives_away: bool = False,
    ) -> ForkServer:
        """Return a server on the inherited socket; raises ForkServerError without one."""
        number = os.environ.get(FORK_FD_ENV, "")
        if not number.isdigit():
            raise ForkServerError(f"{FORK_FD_ENV}: got {number!r}, expected a descriptor")
        channel = socket.socket(fileno=int(number))
        return cls(
            channel, process_name=process_name, before_fork=before_fork, gives_away=gives_away
        )

    def run(self) -> bool:
        """Serve; return False once the launcher is gone, and True in each forked child.

        A child returns with its environment, output and descriptors, and without the server's.
        """
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._channel:
                    self._report_exit(key.fd)
                    continue
                packet, received, _, _ = socket.recv_fds(
                    self._channel, MAX_PACKET_BYTES, MAX_DESCRIPTORS
                )
                if not packet:
                    return False
                if self._handle(json.loads(packet), received):
                    return True

    def _handle(self, message: Mapping[str, object], received: Sequence[int]) -> bool:
        match message:
            case {"signal": int(number), "pid": int(pid)}:
                if pid in self._pids.values():  # not reaped yet, so the pid is not reused
                    os.kill(pid, number)
                return False
            case {"environment": dict(environment), "descriptors": list(numbers)}:
                return self._fork(ForkRequest(environment, tuple(numbers)), received)
        raise ForkServerError(f"got {message!r}, expected a request of the protocol")

    def _fork(self, request: ForkRequest, received: Sequence[int]) -> bool:
        """Fork; return whether this is the child."""
        self._before_fork(request.environment)
        _check_single_threaded("the preparation of a child")
        parent_pid = os.getppid() if self._gives_away else os.getpid()
        pid = _fork_orphan() if self._gives_away else os.fork()
        if pid == 0:
            die_with_parent(parent_pid)
            if self._gives_away:
                os.setsid()
            self._close_inherited()
            _become(request, received, self._process_name)
            os.environ[PARENT_PID_ENV] = str(parent_pid)
            return True
        for descriptor in received:
            os.close(descriptor)
        if not self._gives_away:
            ended = os.pidfd_open(pid)
            self._pids[ended] = pid
            self._selector.register(ended, selectors.EVENT_READ)
        self._send({"forked": pid})
        return False

    def _report_exit(self, ended: int) -> None:
        self._selector.unregister(ended)
        os.close(ended)
        pid, status = os.waitpid(self._pids.pop(ended), 0)
        self._send({"exited": pid, "status": os.waitstatus_to_exitcode(status)})

    def _send(self, message: Mapping[str, int]) -> None:
        # Without a launcher, as the next read says, nobody asks.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(json.dumps(message).encode())

    def _close_inherited(self) -> None:
        self._selector.close()
        self._channel.close()
        for ended in self._pids:
            os.close(ended)


def _fork_orphan() -> int:
    """Fork a process between, which forks the child and ends; return as `os.fork` does.

    Both return only when the child has been adopted. It ends if this process does before that.
    """
    (pid_reader, pid_writer), (go_reader, go_writer) = os.pipe(), os.pipe()
    between = os.fork()
    if between == 0:
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)
        if pid:
            os.write(pid_writer, str(pid).encode())
            os._exit(0)
        for descriptor in (pid_reader, pid_writer, go_writer):
            os.close(descriptor)
        if not os.read(go_reader, 1):
            os._exit(1)
        os.close(go_reader)
        return 0
    for descriptor in (pid_writer, go_reader):
        os.close(descriptor)
    with os.fdopen(pid_reader, "rb") as reader, os.fdopen(go_writer, "wb", buffering=0) as go:
        os.waitpid(between, 0)  # its children have been adopted then
        pid = int(reader.read(MAX_PID_DIGITS) or 0)
        if not pid:
            raise ForkServerError("the process between could not fork")
        with contextlib.suppress(BrokenPipeError):  # the child was killed
            go.write(b"!")
    return pid


def _check_single_threaded(after: str) -> None:
    """Raise ForkServerError if this process has other threads."""
    n_threads = len(os.listdir("/proc/self/task"))
    if n_threads > 1:
        raise ForkServerError(f"threads: got {n_threads} after {after}, expected one")


def _become(request: ForkRequest, received: Sequence[int], process_name: str) -> None:
    """Give this process a request's output, descriptors, environment and name."""
    output, *descriptors = received
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    free = max(request.descriptors, default=0) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, request.descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, process_name.encode(), 0, 0, 0)
