"""The control process as a child: its port, environment, health check and status request.

Imports the HTTP client when it is used, so that processes start before that takes its time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faasmoe_operator.control.models_file import WARM_PATH
from faasmoe_operator.errors import CommandError

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "faasmoe_operator.control")
HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
GRACE_S = 5.0
PROBE_INTERVAL_S = 0.02
RESPONSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReservedControlPort:
    """A TCP port reserved until `close`, so that a restarted control process gets the same one.

    Attributes:
        reservation: a socket bound to the port.
    """

    reservation: socket.socket

    @classmethod
    def reserve(cls) -> ReservedControlPort:
        """Reserve a free port.

        The socket is bound but does not listen, and SO_REUSEADDR lets a child bind the same port.
        """
        reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((HOST, 0))
        return cls(reservation)

    @property
    def number(self) -> int:
        """Port number."""
        port: int = self.reservation.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Base URL of the control API."""
        return f"http://{HOST}:{self.number}"

    def close(self) -> None:
        """Release the port."""
        self.reservation.close()


@dataclass(frozen=True, slots=True)
class StackSecrets:
    """Secrets shared by the processes of one `faasmoe up`; passed in environments only.

    Attributes:
        token: bearer token of the sandboxes and the control API.
        function_key: key from which function ids are derived, in hexadecimal.
    """

    token: str
    function_key: str


def environment(
    file: Path,
    *,
    zygote_socket: Path,
    port: ReservedControlPort,
    secrets: StackSecrets,
    page_variables: Mapping[str, str] | None = None,
    trace_variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of the control process.

    Args:
        file: the MoEModel file.
        zygote_socket: Unix socket of the zygote.
        port: port of the control API.
        secrets: token and function key.
        page_variables: settings of the live page; None serves none.
        trace_variables: variables by which it traces.
    """
    return {
        **os.environ,
        **(trace_variables or {}),
        "FAASMOE_MODEL_FILE": str(file.resolve()),
        "FAASMOE_ZYGOTE_SOCKET": str(zygote_socket),
        "FAASMOE_CONTROL_HOST": HOST,
        "FAASMOE_CONTROL_PORT": str(port.number),
        "FAASMOE_TOKEN": secrets.token,
        "FAASMOE_FUNCTION_KEY": secrets.function_key,
        **(page_variables or {}),
    }


def shared_environment(
    models_file: Path,
    *,
    port: ReservedControlPort,
    token: str,
    gateway_file: Path,
    lease_socket: Path | None = None,
    page_variables: Mapping[str, str] | None = None,
    trace_variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of the control process of several models.

    Args:
        models_file: the models.
        port: port of the control API.
        token: bearer token of the control API and of the sandboxes.
        gateway_file: the tenants.
        lease_socket: where gateways lease tokens of limits; None if there is only one.
        page_variables: settings of the live page; None serves none.
        trace_variables: variables by which it traces.
    """
    return {
        **os.environ,
        **(trace_variables or {}),
        "FAASMOE_MODELS_FILE": str(models_file),
        "FAASMOE_GATEWAY_FILE": str(gateway_file),
        "FAASMOE_LEASE_SOCKET": "" if lease_socket is None else str(lease_socket),
        "FAASMOE_CONTROL_HOST": HOST,
        "FAASMOE_CONTROL_PORT": str(port.number),
        "FAASMOE_TOKEN": token,
        **(page_variables or {}),
    }


async def wait_until_healthy(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll the control API until it is healthy.

    Raises:
        CommandError: it was not healthy within timeout_s seconds.
    """
    import aiohttp

    deadline_s = time.monotonic() + timeout_s
    timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while time.monotonic() < deadline_s:
            try:
                async with http.get(f"{url}/healthz") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass  # not listening yet, or busy
            await asyncio.sleep(PROBE_INTERVAL_S)
    raise CommandError(f"the control process was not healthy within {timeout_s:g} s")


async def warm_up(url: str, *, token: str, model: str) -> None:
    """Let a model's functions start, as its router does; only saves time, so errors are logged.

    Args:
        url: base URL of the control API of several models.
        token: its bearer token.
        model: the model's name.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
            http.post(f"{url}{WARM_PATH}", json={"model": model}) as response,
        ):
            response.raise_for_status()
    except (aiohttp.ClientError, TimeoutError) as error:
        logger.warning("the functions of %s are not started with its router: %s", model, error)


async def fetch_status(url: str, *, token: str) -> dict[str, Any]:
    """Return the response to GET /v1/status.

    Raises:
        CommandError: the control API is unreachable, refuses the token or sends no JSON.
    """
    import aiohttp

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
        raise CommandError(f"control {url}: no response in {RESPONSE_TIMEOUT_S:g} s") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise CommandError(f"control {url}: {error}") from error
