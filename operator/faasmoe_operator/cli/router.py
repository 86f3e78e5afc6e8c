"""The router as a child process: its environment, listening address and health check.

Imports the HTTP client when it is used, so that processes start before that takes its time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from faasmoe_operator.cli.child_process import RunChild, running_child
from faasmoe_operator.cli.common_zygote import library_variables
from faasmoe_operator.cli.supervisor import RestartPolicy
from faasmoe_operator.cli.zygote import Zygote
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

COMMAND = (sys.executable, "-m", "faasmoe_router")
ZYGOTE_COMMAND = (sys.executable, "-m", "faasmoe_router.zygote")
VLLM_PYTHON_VARIABLE = "FAASMOE_VLLM_PYTHON"
ZYGOTE_GRACE_S = 5.0
START_TIMEOUT_S = 900.0
GRACE_S = 35.0  # the router drains running requests for up to 30 s
PROBE_INTERVAL_S = 0.02
PROBE_TIMEOUT_S = 2.0
PROGRESS_INTERVAL_S = 5.0
BACKLOG = 2048  # clients that wait while the router is restarted
RESTARTS = RestartPolicy(backoff_s=(0.0, 0.5, 2.0, 5.0, 10.0), max_failures=20, must_start=True)

DEFAULT_ENVIRONMENT = {
    # Spinning OpenMP threads would take CPU time from the sandboxes.
    "OMP_WAIT_POLICY": "PASSIVE",
    # One malloc arena per thread would retain free memory in each.
    "MALLOC_ARENA_MAX": "1",
    # A cached primitive takes about 0.5 MB and every row count needs its own; the default is 1024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
ZYGOTE_VARIABLES = {"OPENBLAS_NUM_THREADS": "1"}  # a process with other threads must not fork


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address on which the router listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Base URL for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def check_free(self) -> None:
        """Raise CommandError if the address cannot be bound."""
        self.listen().close()

    def listen(self) -> socket.socket:
        """Return a socket that listens on the address; raises CommandError."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(BACKLOG)
            except BaseException:
                listener.close()
                raise
        except OSError as error:
            raise CommandError(
                f"--host, --port: cannot listen on {self.host}:{self.port}: {error.strerror}",
                exit_status=2,
            ) from error
        return listener


@dataclass(frozen=True, slots=True)
class RouterSocket:
    """Where a router listens behind a gateway.

    Attributes:
        path: its Unix socket.
        front_token: what the gateway shows it.
        index: its number among the model's routers.
    """

    path: Path
    front_token: str
    index: int = 0


def environment(
    deployment: LocalModel,
    endpoint: Endpoint,
    *,
    control_url: str,
    token: str,
    tenants_file: Path | None = None,
    cors_origins: Sequence[str] = (),
    listen_fd: int | None = None,
    keep_alive_s: float | None = None,
    behind: RouterSocket | None = None,
    trace_variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment of the router.

    Variables of spec.router.env override inherited ones; FAASMOE_* settings override both.

    Args:
        deployment: the model to serve.
        endpoint: address to listen on.
        control_url: base URL of the control API.
        token: bearer token of the sandboxes and the control API.
        tenants_file: the tenants file; without one the model is open to everyone.
        cors_origins: origins of web pages that may call the API, beside those of the file.
        listen_fd: descriptor of a socket that listens on `endpoint`; None lets the router open one.
        keep_alive_s: how long unused connections are kept; None for the spec's, or the default.
        behind: where it listens behind a gateway; None without one.
        trace_variables: variables by which it traces.
    """
    router = deployment.model.spec.router
    index = 0 if behind is None else behind.index
    state_path = deployment.state_path / (f"router-{index}" if index else "router")
    metrics_port = None if router.metrics_port is None else router.metrics_port + index
    settings = {
        "STORE": deployment.store_path,
        "CONTROL_URL": control_url,
        "MODEL_NAME": deployment.served_model_name,
        "HOST": endpoint.host,
        "PORT": endpoint.port,
        "LISTEN_FD": listen_fd,
        "LISTEN_PATH": None if behind is None else behind.path,
        "FRONT_TOKEN": None if behind is None else behind.front_token,
        "KEEP_ALIVE": router.keep_alive_seconds if keep_alive_s is None else keep_alive_s,
        "METRICS_PORT": metrics_port,
        "ENGINE": router.engine,
        "ENGINE_ARGS": router.engine_arguments,
        "DEVICE": router.device,
        "DTYPE": router.dtype,
        "COMPUTE": router.compute,
        "PLACEMENT": deployment.model.spec.experts.placement or "auto",
        "EXPERTS_MEMORY_BYTES": deployment.model.spec.experts.memory_bytes,
        "MAX_NUM_SEQS": router.max_num_seqs,
        "MAX_NUM_BATCHED_TOKENS": router.max_num_batched_tokens,
        "MAX_WAITING": router.max_waiting,
        "MAX_MODEL_LEN": router.max_model_len,
        "KV_CACHE_BYTES": router.kv_cache_bytes,
        "GENERATION_CONFIG": router.generation_config,
        "CORS_ORIGINS": ",".join(dict.fromkeys((*router.cors_origins, *cors_origins))) or None,
        "TENANTS_FILE": tenants_file,
        "STATE_DIR": None if tenants_file is None else state_path,
        "TOKEN": token,
    }
    return {
        **DEFAULT_ENVIRONMENT,
        **os.environ,
        **(trace_variables or {}),
        **{variable.name: variable.value for variable in router.env},
        **{f"FAASMOE_{name}": str(value) for name, value in settings.items() if value is not None},
    }


def zygote_command(environment: Mapping[str, str]) -> Sequence[str]:
    """Return the command of the zygote that forks a router.

    vLLM needs other versions of libraries than the rest: VLLM_PYTHON_VARIABLE names the interpreter
    of its environment, by default this one.

    Args:
        environment: the router's complete environment.
    """
    engine = environment.get("FAASMOE_ENGINE", "auto")
    if engine == "transformers" or (engine == "auto" and find_spec("vllm") is None):
        return ZYGOTE_COMMAND
    python = environment.get(VLLM_PYTHON_VARIABLE) if engine == "vllm" else None
    return (python or sys.executable, *ZYGOTE_COMMAND[1:], "vllm")


def new_zygote(
    environment: Mapping[str, str],
    *,
    log: Callable[[str], None],
    run: RunChild = running_child,
) -> Zygote:
    """Return a zygote of routers.

    Libraries read some variables when they are loaded, so it has the environment of its routers but
    for their settings.

    Args:
        environment: environment of the routers.
        log: called with each line that it writes.
        run: runs its process.
    """
    return Zygote(
        "router zygote",
        zygote_command(environment),
        environment=zygote_environment(environment),
        log=log,
        grace_s=ZYGOTE_GRACE_S,
        run=run,
    )


def zygote_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a zygote of routers, given that of one of them."""
    return {**library_variables(environment), **ZYGOTE_VARIABLES}


def zygote_key(environment: Mapping[str, str]) -> Hashable:
    """Return what routers have in common that one zygote can fork."""
    return (*zygote_command(environment), *sorted(library_variables(environment).items()))


async def wait_until_healthy(
    endpoint: Endpoint,
    *,
    progress: Callable[[str], None],
    timeout_s: float = START_TIMEOUT_S,
    socket_path: Path | None = None,
) -> None:
    """Poll the router until it is healthy.

    Args:
        endpoint: address of the router.
        socket_path: its Unix socket, if it is to be reached there.
        progress: called with a message every PROGRESS_INTERVAL_S seconds.
        timeout_s: how long to wait.

    Raises:
        CommandError: it was not healthy within timeout_s seconds.
    """
    import aiohttp

    started_s = last_progress_s = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    connector = None if socket_path is None else aiohttp.UnixConnector(str(socket_path))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        while True:
            try:
                if socket_path is None or _is_listened_on(socket_path):
                    async with http.get(f"{endpoint.url}/health") as response:
                        if response.status == 200:
                            return
            except (aiohttp.ClientError, TimeoutError):
                pass  # not listening yet, or busy
            now_s = time.monotonic()
            if now_s - started_s > timeout_s:
                raise CommandError(f"the router was not healthy within {timeout_s:g} s")
            if now_s - last_progress_s > PROGRESS_INTERVAL_S:
                progress(f"waiting for the router, {now_s - started_s:.0f} s")
                last_progress_s = now_s
            await asyncio.sleep(PROBE_INTERVAL_S)


def _is_listened_on(path: Path) -> bool:
    """Return whether a process listens on a Unix socket.

    A tenth of what it costs an HTTP client to find out; a router that starts is probed some twenty
    times until then.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == 0
