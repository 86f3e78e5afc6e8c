"""The zygote of the process platform: what starts it, and a client of its unix socket."""

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
MAX_SOCKET_PATH_BYTES = 106  # of sockaddr_un on Linux, less an ending zero and the zygote's ~
TERMINATE_TIMEOUT_S = 10.0
HANDSHAKE_TIMEOUT_S = 5.0

SANDBOX_ENVIRONMENT: Mapping[str, str] = {
    # What the parent would inherit to children before one of them sets its own number.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Threads that wait by spinning steal the cores that the router computes on.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # Give a prompt's buffers back rather than keep them for the next one: 10 MB a sandbox.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
}


def zygote_environment(
    socket: Path, *, token: str, store: Path | None = None, device: str = "auto"
) -> dict[str, str]:
    """Return the whole environment of a zygote; raises PlatformError.

    Args:
        socket: the unix socket that it will listen on.
        token: the token that its sandboxes will ask for.
        store: the prepared model whose functions it rehearses before it forks; None for none.
        device: where its sandboxes will compute.
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
    """Return what sandboxes and routers of one machine are told of each other.

    Args:
        folder: the zygote socket's.
    """
    return {
        VERIFIED_DIR_VARIABLE: str(folder / VERIFIED_DIR_NAME),
        SOCKET_DIR_VARIABLE: str(folder / SOCKET_DIR_NAME),
    }


class ZygoteClient:
    """A connection to a zygote; ours until the zygote ends or another client comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines = read_lines(reader)
        self._writer = writer

    @classmethod
    async def connect(cls, socket: Path) -> tuple[ZygoteClient, int]:
        """Return a client and the zygote's process id; raises OSError or PlatformError."""
        client = cls(*await asyncio.open_unix_connection(str(socket)))
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                match await client.next_event():
                    case {"event": "ready", "pid": int(pid)}:
                        return client, pid
                    case event:
                        raise PlatformError(f"the zygote said {event!r}, expected ready")
        except BaseException:
            await client.close()
            raise

    async def next_event(self) -> dict[str, Any] | None:
        """Return the next event, or None when the connection has ended."""
        try:
            async for line in self._lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                if isinstance(event, dict):
                    return event
                logger.error("the zygote wrote %r, expected a JSON object", line)
        except ConnectionError as error:
            logger.info("the connection to the zygote broke: %s", error)
        return None

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command; one that comes after the zygote's end is lost, as the sandboxes are."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(command).encode() + b"\n")

    async def close(self) -> None:
        """End the connection; the zygote goes on."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError as error:
            logger.debug("the connection to the zygote ended with: %s", error)


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
    """Run a zygote of our own as long as the context lasts; use in the main thread.

    Args:
        socket: where it listens; its folder must be there, and ours alone.
        token: the token that the sandboxes will ask for.
        store: what it rehearses; see `zygote_environment`.
        device: where the sandboxes will compute.
        log: gets each line that the zygote or a sandbox writes.
        command: what to run.
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
        start_new_session=True,  # a Ctrl-C in the terminal is for the launcher to handle
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
