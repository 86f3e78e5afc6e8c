"""The router process's settings, read once from its environment."""

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from faasmoe_router.errors import RouterConfigError

PREFIX = "FAASMOE_"
Device = Literal["auto", "cpu", "cuda"]
PlacementMode = Literal["auto", "functions"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What the router is started with; each field is the variable FAASMOE_FIELD, less its `_s`.

    Of `table` and `control_url` there is exactly one.

    Attributes:
        store: the store's folder.
        table: a JSON file with a function table that never changes.
        control_url: where the control plane tells the function table, hears of the load, and
            starts functions.
        model_name: the name that requests give; by default the store's source, without its path.
        host: address to listen at.
        port: port to listen at.
        device: where the router's part of the model runs.
        max_model_len: tokens of one request, prompt and output; by default what the model was made
            for, at most 8192.
        max_num_seqs: requests computed in one batch.
        max_num_batched_tokens: tokens computed in one batch.
        max_waiting: requests that may wait beyond those; more get a 429.
        kv_cache_bytes: what the KV cache and what grows with it may take; by default 2 GiB, or
            what one request of full length needs if that is more.
        token: what sandboxes and the control plane are called with; empty calls them without.
        activation_timeout_s: how long a request is held until the functions it needs are there.
        call_queue_timeout_s: how long running requests wait for a function that was taken from them,
            before it is computed in the router.
        max_activation_queue_requests: requests that may be held; more get a 429.
        max_activation_queue_bytes: what the bodies of held requests may take; more get a 429.
        tenants_file: who the tenants are; without it whoever reaches the router may call.
        state_dir: folder of this router alone, where the tenants' accounts are kept; without it
            they begin anew at each start.
        socket_dir: folder in which sandboxes of the same machine have Unix sockets, a shorter way
            than TCP; without it, and where there is none, they are called over TCP.
        placement: auto computes hot functions of this machine in the router where that was
            measured to take less time; functions never does. Needs socket_dir.
        router_replicas: routers that the tenants' limits are split over, unless the file tells.
        connect_timeout_s: until a sandbox has accepted a connection; part of a call.
        call_timeout_s: until a function has answered; part of a layer.
        layer_timeout_s: until all of a layer's functions have answered, all that is tried and
            waited for included, or the rest is computed in the router; part of a request.
        request_timeout_s: until a request's last token; it ends with an error then.
    """

    store: Path
    table: Path | None = None
    control_url: str | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: Device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None
    token: str = ""
    activation_timeout_s: float = 30.0
    call_queue_timeout_s: float = 2.0
    max_activation_queue_requests: int = 1024
    max_activation_queue_bytes: int = 64 << 20
    tenants_file: Path | None = None
    state_dir: Path | None = None
    socket_dir: Path | None = None
    placement: PlacementMode = "functions"
    router_replicas: int = 1
    connect_timeout_s: float = 1.0
    call_timeout_s: float = 10.0
    layer_timeout_s: float = 30.0
    request_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        """Refuse to guess where functions are."""
        if self.table is None and self.control_url is None:
            raise RouterConfigError("FAASMOE_TABLE: not set, expected it or FAASMOE_CONTROL_URL")
        if self.table is not None and self.control_url is not None:
            raise RouterConfigError(
                "FAASMOE_CONTROL_URL: got it and FAASMOE_TABLE, expected only one of the two"
            )

        names = ("connect", "call", "layer", "request")
        for inner, outer in itertools.pairwise(names):
            inner_s, outer_s = (getattr(self, f"{name}_timeout_s") for name in (inner, outer))
            if inner_s > outer_s:
                raise RouterConfigError(
                    f"{PREFIX}{inner.upper()}_TIMEOUT: got {inner_s:g}, expected at most "
                    f"{PREFIX}{outer.upper()}_TIMEOUT, {outer_s:g}, which it is part of"
                )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "RouterConfig":
        """Read the settings; raises ConfigError that names the variable."""

        def read(name: str, parse: Callable[[str], T], default: T) -> T:
            value = env.get(PREFIX + name, "")
            if not value:
                return default
            try:
                return parse(value)
            except ValueError as error:
                raise RouterConfigError(
                    f"{PREFIX}{name}: got {value!r}, expected {error}"
                ) from None

        return cls(
            store=Path(_required(env, "STORE")),
            table=read("TABLE", _path, None),
            control_url=read("CONTROL_URL", _url, None),
            model_name=read("MODEL_NAME", str, "") or None,
            host=read("HOST", str, "127.0.0.1"),
            port=read("PORT", _between(0, 65535), 8000),
            device=read("DEVICE", _device, "auto"),
            max_model_len=read("MAX_MODEL_LEN", _between(1, 1 << 24), 0) or None,
            max_num_seqs=read("MAX_NUM_SEQS", _between(1, 4096), 32),
            max_num_batched_tokens=read("MAX_NUM_BATCHED_TOKENS", _between(1, 1 << 20), 512),
            max_waiting=read("MAX_WAITING", _between(0, 1 << 20), 1024),
            kv_cache_bytes=read("KV_CACHE_BYTES", _between(1, 1 << 50), 0) or None,
            token=read("TOKEN", str, ""),
            activation_timeout_s=read("ACTIVATION_TIMEOUT", _seconds(0.1, 3600), 30.0),
            call_queue_timeout_s=read("CALL_QUEUE_TIMEOUT", _seconds(0, 60), 2.0),
            max_activation_queue_requests=read(
                "MAX_ACTIVATION_QUEUE_REQUESTS", _between(0, 1 << 20), 1024
            ),
            max_activation_queue_bytes=read(
                "MAX_ACTIVATION_QUEUE_BYTES", _between(0, 1 << 40), 64 << 20
            ),
            tenants_file=read("TENANTS_FILE", _path, None),
            state_dir=read("STATE_DIR", _path, None),
            socket_dir=read("SOCKET_DIR", _path, None),
            placement=read("PLACEMENT", _placement, "functions"),
            router_replicas=read("ROUTER_REPLICAS", _between(1, 1024), 1),
            connect_timeout_s=read("CONNECT_TIMEOUT", _seconds(0.01, 3600), 1.0),
            call_timeout_s=read("CALL_TIMEOUT", _seconds(0.01, 3600), 10.0),
            layer_timeout_s=read("LAYER_TIMEOUT", _seconds(0.01, 3600), 30.0),
            request_timeout_s=read("REQUEST_TIMEOUT", _seconds(0.1, 86400), 3600.0),
        )


def _required(env: Mapping[str, str], name: str) -> str:
    value = env.get(PREFIX + name, "")
    if not value:
        raise RouterConfigError(f"{PREFIX}{name}: not set, expected a path")
    return value


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(text)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        error = ValueError(f"seconds, a number from {low:g} to {high:g}")
        try:
            value = float(text)
        except ValueError:
            raise error from None
        if not low <= value <= high:  # nor NaN
            raise error
        return value

    return parse


def _path(text: str) -> Path | None:
    return Path(text)


def _url(text: str) -> str | None:
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text.rstrip("/")
    except ValueError:  # a port that is no number
        pass
    raise ValueError("a URL such as http://127.0.0.1:8080")


def _device(text: str) -> Device:
    if text not in ("auto", "cpu", "cuda"):
        raise ValueError("auto, cpu or cuda")
    return cast(Device, text)


def _placement(text: str) -> PlacementMode:
    if text not in ("auto", "functions"):
        raise ValueError("auto or functions")
    return cast(PlacementMode, text)
