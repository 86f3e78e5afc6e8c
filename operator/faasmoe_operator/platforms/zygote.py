"""The zygote of the process platform: its process, its environment and a client of its socket.

The zygote (`faasmoe_expert.zygote`) imports everything that a sandbox needs and forks sandboxes on
request, so that they start in milliseconds and share memory. Commands and events are JSON objects,
one on each line of a unix socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_operator.aio import read_lines
from faasmoe_operator.errors import PlatformError

logger = logging.getLogger(__name__)

ZYGOTE_COMMAND = (sys.executable, "-m", "faasmoe_expert.zygote")
ZYGOTE_SOCKET_VARIABLE = "FAASMOE_ZYGOTE_SOCKET"
VERIFIED_DIR_VARIABLE = "FAASMOE_VERIFIED_DIR"
SOCKET_DIR_VARIABLE = "FAASMOE_SOCKET_DIR"
VERIFIED_DIR_NAME = "verified"
SOCKET_DIR_NAME = "sockets"
WARMUP_STORE_VARIABLE = "FAASMOE_WARMUP_STORE"
MAX_SOCKET_PATH_BYTES = 106  # sockaddr_un.sun_path on Linux, minus NUL and the zygote's suffix ~
TERMINATE_TIMEOUT_S = 10.0
HANDSHAKE_TIMEOUT_S = 5.0

SANDBOX_ENVIRONMENT: Mapping[str, str] = {
    # Children inherit the thread count of the zygote until they set their own.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Spinning threads would take CPU time from the router.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # Return a prompt's buffers to the system instead of caching them: saves 10 MB per sandbox.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
}


def zygote_environment(
    socket: Path, *, token: str, store: Path | None = None, device: str = "auto"
) -> dict[str, str]:
    """Return the complete environment of a zygote process.

    Args:
        socket: unix socket that the zygote listens on.
        token: bearer token that its sandboxes require.
        store: store whose functions it runs for warm-up before the first fork; None for no warm-up.
        device: compute device of its sandboxes: auto, cpu or cuda.

    Raises:
        PlatformError: the socket's path is too long for the operating system.
    """
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH_BYTES:
        expected = f"at most {MAX_SOCKET_PATH_BYTES} bytes"
        raise PlatformError(f"zygote socket: got {socket}, expected a path of {expected}")
    own = {
        "FAASMOE_TOKEN": token,
        "FAASMOE_DEVICE": device,
        ZYGOTE_SOCKET_VARIABLE: str(socket),
        **shared_dir_variables(socket.parent),
        WARMUP_STORE_VARIABLE: "" if store is None else str(store),
    }
    return {**os.environ, **SANDBOX_ENVIRONMENT, **own}


def shared_dir_variables(folder: Path) -> dict[str, str]:
    """Return the variables that name the folders shared by sandboxes and routers of a machine.

    Args:
        folder: the folder of the zygote's socket.
    """
    return {
        VERIFIED_DIR_VARIABLE: str(folder / VERIFIED_DIR_NAME),
        SOCKET_DIR_VARIABLE: str(folder / SOCKET_DIR_NAME),
    }


class ZygoteClient:
    """A connection to a zygote; the zygote closes it when another client connects."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines = read_lines(reader)
        self._writer = writer

    @classmethod
    async def connect(cls, socket: Path) -> tuple[ZygoteClient, int]:
        """Return a client and the zygote's process id.

        Raises:
            OSError: the socket does not exist or refuses the connection.
            PlatformError: the zygote's first event was not `ready`.
            TimeoutError: the zygote did not respond.
        """
        client = cls(*await asyncio.open_unix_connection(str(socket)))
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                match await client.next_event():
                    case {"event": "ready", "pid": int(pid)}:
                        return client, pid
                    case event:
                        raise PlatformError(f"zygote sent {event!r}, expected a ready event")
        except BaseException:
            await client.close()
            raise

    async def next_event(self) -> dict[str, Any] | None:
        """Return the next event, or None after the end of the connection."""
        try:
            async for line in self._lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                if isinstance(event, dict):
                    return event
                logger.error("zygote sent %r, expected a JSON object", line)
        except ConnectionError as error:
            logger.info("lost the connection to the zygote: %s", error)
        return None

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command; dropped after the end of the connection."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(command).encode() + b"\n")

    async def close(self) -> None:
        """Close the connection; the zygote keeps running."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError as error:
            logger.debug("error while closing the connection to the zygote: %s", error)


@asynccontextmanager
async def run_zygote(
    socket: Path,
    *,
    token: str,
    store: Path | None = None,
    device: str = "auto",
    log: Callable[[str], None] = logger.info,
    command: Sequence[str] = ZYGOTE_COMMAND,
) -> AsyncIterator[Process]:
    """Run a zygote until the context exits; use in the main thread.

    Args:
        socket: unix socket to listen on; its folder must exist and be accessible to this user only.
        token: bearer token that the sandboxes require.
        store: store used for warm-up; see `zygote_environment`.
        device: compute device of the sandboxes: auto, cpu or cuda.
        log: called with each line that the zygote or a sandbox writes.
        command: command line of the zygote.

    Raises:
        PlatformError: the socket's path is too long.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env={
            **zygote_environment(socket, token=token, store=store, device=device),
            PARENT_PID_ENV: str(os.getpid()),
        },
        start_new_session=True,  # Ctrl-C in the terminal goes to the launcher only
    )
    logs = asyncio.create_task(_forward_logs(process, log))
    try:
        yield process
    finally:
        await _terminate(process)
        await logs


async def _forward_logs(process: Process, log: Callable[[str], None]) -> None:
    assert process.stdout is not None
    async for line in read_lines(process.stdout):
        log(line)


async def _terminate(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(TERMINATE_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
