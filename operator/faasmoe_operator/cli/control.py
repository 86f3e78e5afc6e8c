"""The control process as a child: its address, its environment, and asking it for its state."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from faasmoe_operator.errors import CommandError

COMMAND = (sys.executable, "-m", "faasmoe_operator.control")
HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
GRACE_S = 5.0
PROBE_INTERVAL_S = 0.05
RESPONSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReservedControlPort:
    """A port that is ours for as long as this object lives, control restarts included."""

    reservation: socket.socket

    @classmethod
    def reserve(cls) -> ReservedControlPort:
        """Reserve a free port: bound, not listened on, so that a child of ours can listen."""
        reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((HOST, 0))
        return cls(reservation)

    @property
    def number(self) -> int:
        """The port."""
        port: int = self.reservation.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Address of the control API."""
        return f"http://{HOST}:{self.number}"

    def close(self) -> None:
        """Give the port back."""
        self.reservation.close()


@dataclass(frozen=True, slots=True)
class StackSecrets:
    """What the processes of one `faasmoe up` share; never in a command line.

    Attributes:
        token: for the sandboxes and the control API.
        function_key: of the function ids, hexadecimal.
    """

    token: str
    function_key: str


def environment(
    file: Path, *, zygote_socket: Path, port: ReservedControlPort, secrets: StackSecrets
) -> dict[str, str]:
    """Return the whole environment of the control process.

    Args:
        file: the MoEModel file.
        zygote_socket: where the zygote listens.
        port: where to listen.
        secrets: the token and the key.
    """
    return {
        **os.environ,
        "FAASMOE_MODEL_FILE": str(file.resolve()),
        "FAASMOE_ZYGOTE_SOCKET": str(zygote_socket),
        "FAASMOE_CONTROL_HOST": HOST,
        "FAASMOE_CONTROL_PORT": str(port.number),
        "FAASMOE_TOKEN": secrets.token,
        "FAASMOE_FUNCTION_KEY": secrets.function_key,
    }


async def wait_until_healthy(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the control API answers; raises CommandError."""
    deadline_s = time.monotonic() + timeout_s
    timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while time.monotonic() < deadline_s:
            try:
                async with http.get(f"{url}/healthz") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(PROBE_INTERVAL_S)
    raise CommandError(f"the control process did not answer after {timeout_s:g} s")


async def fetch_status(url: str, *, token: str) -> dict[str, Any]:
    """Return the control's state; raises CommandError."""
    timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
            http.get(f"{url}/v1/status") as response,
        ):
            if response.status != 200:
                raise CommandError(f"control {url}: got status {response.status}, expected 200")
            status: dict[str, Any] = await response.json()
            return status
    except TimeoutError as error:
        raise CommandError(f"control {url}: no answer in {RESPONSE_TIMEOUT_S:g} s") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise CommandError(f"control {url}: {error}") from error
