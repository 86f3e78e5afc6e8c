"""Sandbox settings, read once from FAASMOE_* environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from faasmoe_contracts.tls import DEFAULT_NAMESPACE, TlsError, TlsFolder
from faasmoe_contracts.wire import MAX_FRAME_BYTES

IDLE_TIMEOUT_S = 600.0  # well above pauses in a router's traffic
MAX_CONNECTIONS = 1024
MAX_FRAMES = 256
MAX_BODIES_BYTES = 64 << 20


class SandboxConfigError(ValueError):
    """Raised for an invalid setting; the message names the variable."""


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """Settings of one sandbox.

    Attributes:
        id: name of the sandbox in the control plane.
        host: address to listen on.
        port: TCP port to listen on; 0 lets the system choose.
        metrics_port: TCP port of /metrics alone; on the common port if None.
        metrics_min_tokens: tokens that what /metrics shows of functions holds at least, 1 or more;
            1 shows exact counts at once.
        capacity: maximum number of attached functions, 1 or more.
        device: device that experts are computed on: cpu, cuda, cuda:N or auto.
        threads: intra-op threads on the CPU, 1 or more.
        memory_bytes: limit on the parameters of all functions together; None for no limit on the
            CPU, and for the device's free memory on CUDA.
        token: bearer token required by /v1; empty requires none.
        request_timeout_s: time for a client to send a complete request, to read its response, and
            for the handshake of TLS.
        idle_timeout_s: time after which a connection without requests is closed.
        max_connections: maximum number of open connections, 1 or more.
        max_frames: maximum number of request bodies read concurrently, 1 or more.
        max_bodies_bytes: limit on their total size; at least MAX_FRAME_BYTES.
        socket_dir: directory of a Unix socket beside the TCP port, for routers on the same machine;
            None for TCP only.
        mailbox: whether routers on the same machine may call over mailboxes; needs socket_dir.
        drain_s: how long a stopping sandbox keeps connections open to reject new work.
        store_peers: URLs of block servers, from which the blocks of functions are fetched whose
            store is not at its path; none if empty.
        cache_dir: folder for what is fetched; needed with store_peers.
        cache_bytes: limit on its bytes; None for no limit.
        tls_folder: certificate, key and authorities for TLS on the TCP port and with store peers;
            None for neither. Metrics on a port of their own have no TLS.
        tls_namespace: namespace of the model, which its routers and store servers show.
    """

    id: str = "sandbox"
    host: str = "127.0.0.1"
    port: int = 9090
    metrics_port: int | None = None
    metrics_min_tokens: int = 256
    capacity: int = 1
    device: str = "auto"
    threads: int = 1
    memory_bytes: int | None = None
    token: str = ""
    request_timeout_s: float = 30.0
    idle_timeout_s: float = IDLE_TIMEOUT_S
    max_connections: int = MAX_CONNECTIONS
    max_frames: int = MAX_FRAMES
    max_bodies_bytes: int = MAX_BODIES_BYTES
    socket_dir: Path | None = None
    mailbox: bool = True
    drain_s: float = 1.0
    store_peers: tuple[str, ...] = ()
    cache_dir: Path | None = None
    cache_bytes: int | None = None
    tls_folder: Path | None = None
    tls_namespace: str = DEFAULT_NAMESPACE

    def __post_init__(self) -> None:
        """Validate all settings; raises SandboxConfigError."""
        _require_at_least("FAASMOE_CAPACITY", self.capacity, 1)
        _require_at_least("FAASMOE_THREADS", self.threads, 1)
        _require_at_least("FAASMOE_METRICS_MIN_TOKENS", self.metrics_min_tokens, 1)
        if self.memory_bytes is not None:
            _require_at_least("FAASMOE_MEMORY_BYTES", self.memory_bytes, 1)
        _require_at_least("FAASMOE_MAX_CONNECTIONS", self.max_connections, 1)
        _require_at_least("FAASMOE_MAX_FRAMES", self.max_frames, 1)
        _require_at_least("FAASMOE_MAX_BODIES_BYTES", self.max_bodies_bytes, MAX_FRAME_BYTES)
        _require_positive("FAASMOE_REQUEST_TIMEOUT_S", self.request_timeout_s)
        _require_positive("FAASMOE_IDLE_TIMEOUT_S", self.idle_timeout_s)
        if not 0 <= self.drain_s < math.inf:
            raise SandboxConfigError(f"FAASMOE_DRAIN_S: got {self.drain_s:g}, expected 0 or more")
        if not 0 <= self.port < 65536:
            raise SandboxConfigError(f"FAASMOE_PORT: got {self.port}, expected 0 to 65535")
        if self.metrics_port is not None and not 1 <= self.metrics_port < 65536:
            raise SandboxConfigError(
                f"FAASMOE_METRICS_PORT: got {self.metrics_port}, expected 1 to 65535"
            )
        self._check_store_peers()
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
            raise SandboxConfigError(
                f"FAASMOE_DEVICE: got {self.device!r}, expected auto, cpu, cuda or cuda:N"
            )

    def _check_store_peers(self) -> None:
        scheme = "http" if self.tls_folder is None else "https"
        for url in self.store_peers:
            if not _is_origin(url, scheme):
                expected = f"{scheme}://HOST:PORT, several separated by commas"
                raise SandboxConfigError(f"FAASMOE_STORE_PEERS: got {url!r}, expected {expected}")
        if (self.cache_dir is None) == bool(self.store_peers):
            got = "none" if self.cache_dir is None else repr(str(self.cache_dir))
            expected = "a folder with FAASMOE_STORE_PEERS, and none without"
            raise SandboxConfigError(f"FAASMOE_CACHE_DIR: got {got}, expected {expected}")
        if self.cache_bytes is not None:
            _require_at_least("FAASMOE_CACHE_BYTES", self.cache_bytes, 1)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> SandboxConfig:
        """Read FAASMOE_* variables; raises SandboxConfigError naming the variable."""
        env = os.environ if env is None else env
        default = cls()
        return cls(
            id=env.get("FAASMOE_SANDBOX_ID", default.id),
            host=env.get("FAASMOE_HOST", default.host),
            port=env_int(env, "FAASMOE_PORT", default.port),
            metrics_port=env_optional_int(env, "FAASMOE_METRICS_PORT"),
            metrics_min_tokens=env_int(
                env, "FAASMOE_METRICS_MIN_TOKENS", default.metrics_min_tokens
            ),
            capacity=env_int(env, "FAASMOE_CAPACITY", default.capacity),
            device=env.get("FAASMOE_DEVICE", default.device),
            threads=env_int(env, "FAASMOE_THREADS", default.threads),
            memory_bytes=env_optional_int(env, "FAASMOE_MEMORY_BYTES"),
            token=env.get("FAASMOE_TOKEN", default.token),
            request_timeout_s=_env_float(
                env, "FAASMOE_REQUEST_TIMEOUT_S", default.request_timeout_s
            ),
            idle_timeout_s=_env_float(env, "FAASMOE_IDLE_TIMEOUT_S", default.idle_timeout_s),
            max_connections=env_int(env, "FAASMOE_MAX_CONNECTIONS", default.max_connections),
            max_frames=env_int(env, "FAASMOE_MAX_FRAMES", default.max_frames),
            max_bodies_bytes=env_int(env, "FAASMOE_MAX_BODIES_BYTES", default.max_bodies_bytes),
            socket_dir=Path(path) if (path := env.get("FAASMOE_SOCKET_DIR")) else None,
            mailbox=_env_on_off(env, "FAASMOE_MAILBOX", default.mailbox),
            drain_s=_env_float(env, "FAASMOE_DRAIN_S", default.drain_s),
            store_peers=tuple(filter(None, env.get("FAASMOE_STORE_PEERS", "").split(","))),
            cache_dir=Path(path) if (path := env.get("FAASMOE_CACHE_DIR")) else None,
            cache_bytes=env_optional_int(env, "FAASMOE_CACHE_BYTES"),
            tls_folder=Path(path) if (path := env.get("FAASMOE_TLS_FOLDER")) else None,
            tls_namespace=env.get("FAASMOE_TLS_NAMESPACE") or default.tls_namespace,
        )


def open_tls_folder(path: Path | None) -> TlsFolder | None:
    """Return the folder of FAASMOE_TLS_FOLDER, if it is set; raises SandboxConfigError."""
    try:
        return None if path is None else TlsFolder(path)
    except TlsError as error:
        raise SandboxConfigError(f"FAASMOE_TLS_FOLDER: {error}") from error


def _is_origin(url: str, scheme: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return (parts.scheme, bool(parts.hostname)) == (scheme, True) and (
        port is not None and url == f"{scheme}://{parts.netloc}" and "@" not in parts.netloc
    )


def env_int(env: Mapping[str, str], name: str, default: int) -> int:
    """Return an integer variable; raises SandboxConfigError."""
    text = env.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise SandboxConfigError(f"{name}: got {text!r}, expected an integer") from None


def env_optional_int(env: Mapping[str, str], name: str) -> int | None:
    """Return an integer variable, None if it is not set; raises SandboxConfigError."""
    return env_int(env, name, 0) if env.get(name, "") else None


def _env_on_off(env: Mapping[str, str], name: str, default: bool) -> bool:
    text = env.get(name, "")
    if text not in ("", "on", "off"):
        raise SandboxConfigError(f"{name}: got {text!r}, expected on or off")
    return text == "on" if text else default


def _env_float(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise SandboxConfigError(f"{name}: got {text!r}, expected a number") from None


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise SandboxConfigError(f"{name}: got {value}, expected {minimum} or more")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise SandboxConfigError(f"{name}: got {value:g}, expected more than 0")
