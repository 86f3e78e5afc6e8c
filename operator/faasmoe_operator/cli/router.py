"""The router as a child: its environment, and waiting until it serves."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

COMMAND = (sys.executable, "-m", "faasmoe_router")
START_TIMEOUT_S = 900.0
GRACE_S = 35.0  # the router finishes running requests for up to 30 s
PROBE_INTERVAL_S = 0.1
PROBE_TIMEOUT_S = 2.0
PROGRESS_INTERVAL_S = 5.0

DEFAULT_ENVIRONMENT = {
    # Threads that wait by spinning steal the cores that the sandboxes compute on.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A heap for each thread would keep free memory in each.
    "MALLOC_ARENA_MAX": "1",
    # Half a megabyte for each shape, and each number of rows is one: 1024 by default.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the router listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Its address for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def check_free(self) -> None:
        """Raise CommandError if nothing could listen here."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise CommandError(
                f"--host, --port: cannot listen on {self.host}:{self.port}: {error.strerror}",
                exit_status=2,
            ) from error


def environment(
    deployment: LocalModel,
    endpoint: Endpoint,
    *,
    control_url: str,
    token: str,
    tenants_file: Path | None = None,
) -> dict[str, str]:
    """Return the whole environment of the router.

    Args:
        deployment: what is to be served.
        endpoint: where.
        control_url: address of the control API.
        token: the sandboxes' and the control's token.
        tenants_file: who may use it; everyone without.
    """
    router = deployment.model.spec.router
    settings = {
        "STORE": deployment.store_path,
        "CONTROL_URL": control_url,
        "MODEL_NAME": deployment.model.metadata.name,
        "HOST": endpoint.host,
        "PORT": endpoint.port,
        "DEVICE": router.device,
        "PLACEMENT": deployment.model.spec.experts.placement or "auto",
        "MAX_NUM_SEQS": router.max_num_seqs,
        "MAX_NUM_BATCHED_TOKENS": router.max_num_batched_tokens,
        "MAX_WAITING": router.max_waiting,
        "MAX_MODEL_LEN": router.max_model_len,
        "KV_CACHE_BYTES": router.kv_cache_bytes,
        "TENANTS_FILE": tenants_file,
        "STATE_DIR": None if tenants_file is None else deployment.state_path / "router",
        "TOKEN": token,
    }
    return {
        **DEFAULT_ENVIRONMENT,
        **os.environ,
        **{variable.name: variable.value for variable in router.env},
        **{f"FAASMOE_{name}": str(value) for name, value in settings.items() if value is not None},
    }


async def wait_until_healthy(
    endpoint: Endpoint,
    *,
    progress: Callable[[str], None],
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Wait until the router says that it can serve; raises CommandError."""
    started_s = last_progress_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while True:
            if await _is_healthy(http, endpoint):
                return
            now_s = time.monotonic()
            if now_s - started_s > timeout_s:
                raise CommandError(f"the router did not serve after {timeout_s:g} s")
            if now_s - last_progress_s > PROGRESS_INTERVAL_S:
                progress(f"waiting for the router, {now_s - started_s:.0f} s")
                last_progress_s = now_s
            await asyncio.sleep(PROBE_INTERVAL_S)


async def _is_healthy(http: aiohttp.ClientSession, endpoint: Endpoint) -> bool:
    try:
        async with http.get(f"{endpoint.url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
