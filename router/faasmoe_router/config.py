"""Settings of the router process, read from its environment."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from faasmoe_contracts.environment import (
    describe_setting_error,
    integer_between,
    read_variables,
    seconds_between,
)
from faasmoe_contracts.tls import DEFAULT_NAMESPACE, TlsError, TlsFolder
from faasmoe_gateway.connections import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS
from faasmoe_router.errors import RouterConfigError

PREFIX = "FAASMOE_"
Device = Literal["auto", "cpu", "cuda"]
DtypeSetting = Literal["auto", "bfloat16", "float16", "float32"]
ComputeMode = Literal["auto", "modules", "torch"]
GenerationConfigMode = Literal["auto", "none"]
PlacementMode = Literal["auto", "functions"]
MailboxMode = Literal["on", "off"]
EngineSetting = Literal["auto", "transformers", "vllm"]


def _check_http_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text.rstrip("/")
    except ValueError:  # an invalid port
        pass
    raise ValueError("a URL such as http://127.0.0.1:8080")


def _split_origins(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
        return origins
    raise ValueError("origins such as https://chat.example.com or *, separated by commas")


_ParserName = Annotated[str, Field(pattern="^[a-z0-9_.-]{1,64}$")]


class VllmArguments(BaseModel):
    """Arguments that go to vLLM's engine as they are, under vLLM's names; None is its default.

    Attributes:
        enforce_eager: whether vLLM leaves its model uncompiled; by default on a CPU only, where
            compiling takes minutes at each start.
        enable_prefix_caching: whether sequences share the KV cache of equal prefixes.
        gpu_memory_utilization: part of the device's memory for model and KV cache.
        max_logprobs: most log-probabilities that a request may ask for with a token.
        tensor_parallel_size: devices, or on a CPU groups of cores, that share each layer.
        tool_call_parser: name of vLLM's parser of tool calls, instead of the one that the model's
            family and chat template imply; `none` for none, and then tools are refused.
        reasoning_parser: name of vLLM's parser of reasoning, or `none`, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    max_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    tool_call_parser: _ParserName | None = None
    reasoning_parser: _ParserName | None = None


def _parse_engine_args(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return VllmArguments.model_validate_json(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "the value"
        raise ValueError(f"a JSON object of vLLM's arguments; {name}: {first['msg']}") from None


_ORIGIN = re.compile(r"https?://[^/\s,]+")
_EngineArgs = Annotated[VllmArguments, BeforeValidator(_parse_engine_args)]
_Origins = Annotated[
    tuple[str, ...], BeforeValidator(_split_origins), AfterValidator(_check_origins)
]
_HttpURL = Annotated[str, AfterValidator(_check_http_url)]
_Port = Annotated[int, BeforeValidator(integer_between(0, 65535))]
_Niceness = Annotated[int, BeforeValidator(integer_between(0, 19))]
_MinTokens = Annotated[int, BeforeValidator(integer_between(1, 1 << 20))]
_MetricsPort = Annotated[int, BeforeValidator(integer_between(1, 65535))]
_ModelLength = Annotated[int, BeforeValidator(integer_between(1, 1 << 24))]
_Sequences = Annotated[int, BeforeValidator(integer_between(1, 4096))]
_BatchedTokens = Annotated[int, BeforeValidator(integer_between(1, 1 << 20))]
_QueueLength = Annotated[int, BeforeValidator(integer_between(0, 1 << 20))]
_CacheBytes = Annotated[int, BeforeValidator(integer_between(1, 1 << 50))]
_ExpertsBytes = Annotated[int, BeforeValidator(integer_between(1, 1 << 50))]
_QueueBytes = Annotated[int, BeforeValidator(integer_between(0, 1 << 40))]
_Replicas = Annotated[int, BeforeValidator(integer_between(1, 1024))]
_ActivationSeconds = Annotated[float, BeforeValidator(seconds_between(0.1, 3600))]
_CallQueueSeconds = Annotated[float, BeforeValidator(seconds_between(0, 60))]
_CallSeconds = Annotated[float, BeforeValidator(seconds_between(0.01, 3600))]
_Descriptor = Annotated[int, BeforeValidator(integer_between(0, 1 << 20))]
_KeepAliveSeconds = Annotated[float, BeforeValidator(seconds_between(1, 3600))]
_DrainSeconds = Annotated[float, BeforeValidator(seconds_between(0, 3600))]
_Connections = Annotated[int, BeforeValidator(integer_between(1, 1 << 20))]
_Namespace = Annotated[str, Field(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
_RequestSeconds = Annotated[float, BeforeValidator(seconds_between(0.1, 86400))]


class RouterConfig(BaseSettings):
    """Settings of a router; each field is the variable FAASMOE_FIELD, without a trailing `_S`.

    Exactly one of `table` and `control_url` is set.

    Attributes:
        store: folder of the store.
        table: JSON file with a routing table that never changes.
        control_url: URL of the control plane, which provides the routing table, receives load
            reports and activates functions.
        model_name: model name that requests give; by default the last part of the store's source.
        host: address to listen on.
        port: port to listen on.
        listen_fd: descriptor of an inherited socket that listens there; by default one is opened.
        device: device of the router's part of the model.
        dtype: dtype in which the router computes; auto is the store's dtype, or float32 on a CPU
            without fast products in that dtype.
        engine: transformers runs this router's own engine, vllm runs vLLM's; auto is vllm where it
            is installed and serves the model's architecture.
        engine_args: arguments of vLLM's engine as JSON; only with engine vllm or auto.
        compute: what computes the router's part on a CPU in float32: auto runs all decoder layers
            as one call of the kernel library where possible, modules runs transformers' modules
            with the library's linear layers and attention, torch leaves the library unused.
        max_model_len: tokens of one request, prompt and output; by default the model's maximum, at
            most 8192.
        max_num_seqs: sequences computed in one batch.
        max_num_batched_tokens: tokens computed in one batch.
        max_waiting: requests that may wait in addition; more are rejected with status 429.
        kv_cache_bytes: memory for the KV cache and what grows with it; by default 2 GiB, or what
            one request of full length needs if that is more.
        token: bearer token for sandboxes and control plane; empty sends none.
        activation_timeout_s: longest time that a request waits for the activation of functions.
        call_queue_timeout_s: longest time that a running request waits for a function that has no
            address, before the router computes it; one that had an address just now is replaced
            within 50 ms, or computed.
        max_activation_queue_requests: requests that may wait for activation; more are rejected
            with status 429.
        max_activation_queue_bytes: total size of their prompts as Python objects; more are rejected
            with status 429.
        tenants_file: the tenants file; without it requests are not authenticated.
        state_dir: folder of this router alone, in which tenants' usage is saved; without it usage
            starts at zero at every start.
        socket_dir: folder in which sandboxes on the same machine have Unix sockets; without it, or
            without a socket, they are called over TCP.
        placement: auto computes frequently used functions of sandboxes on the same machine in the
            router, where that was measured to be faster; functions never does. Needs socket_dir.
        mailbox: on calls sandboxes on the same machine over shared memory without Python where
            possible; off never does. Needs socket_dir and the kernel library.
        experts_memory_bytes: memory limit of the functions of all sandboxes together. If the
            store's experts take more, the router computes functions without an address itself.
        router_replicas: routers that the tenants' limits are split over, unless the tenants file
            states their number.
        cors_origins: origins of web pages that may call the API, separated by commas; `*` is any.
        generation_config: auto takes sampling defaults from the checkpoint's
            generation_config.json, as vLLM does; none ignores them.
        connect_timeout_s: time to connect to a sandbox; part of a call.
        call_timeout_s: time of one call of a function; part of a layer.
        layer_timeout_s: time of all calls of a layer, retries and waiting included, after which the
            router computes the rest; part of a request.
        request_timeout_s: time until the last token of a request, which then fails.
        keep_alive_s: how long an unused connection of a client is kept.
        max_connections: connections of clients, fewer if the process may not open as many files.
        max_connections_per_address: connections of one client address.
        listen_path: Unix socket to listen on instead of `host` and `port`, for a gateway on this
            machine.
        front_token: what a gateway shows, whose streams go on if this router dies; empty without
            one.
        niceness: niceness of its threads once it has listened for some seconds, 0 to 19, so that
            other routers of the machine start sooner.
        metrics_min_tokens: tokens that sums over calls of functions hold at least before /metrics
            shows them, since calls follow the gates' choices; 1 shows them at once.
        metrics_port: port of /metrics alone, which tenants need not reach; by default it is on
            `port`, without a key.
        drain_timeout_s: time that running responses have at shutdown; with some seconds more, less
            than the grace period of the pod.
        tls_folder: certificate, key and authorities for TLS on `port`, with sandboxes and with the
            control plane; None for none of them. Unix sockets never have TLS, nor do metrics on a
            port of their own.
        tls_namespace: namespace of the model, which its sandboxes show.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    store: Path = Field(description="a path")
    table: Path | None = None
    control_url: _HttpURL | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: _Port = 8000
    listen_fd: _Descriptor | None = None
    device: Device = "auto"
    dtype: DtypeSetting = "auto"
    engine: EngineSetting = "auto"
    engine_args: _EngineArgs = VllmArguments()
    compute: ComputeMode = "auto"
    max_model_len: _ModelLength | None = None
    max_num_seqs: _Sequences = 32
    max_num_batched_tokens: _BatchedTokens = 512
    max_waiting: _QueueLength = 1024
    kv_cache_bytes: _CacheBytes | None = None
    token: str = Field(default="", repr=False)
    activation_timeout_s: _ActivationSeconds = 30.0
    call_queue_timeout_s: _CallQueueSeconds = 2.0
    max_activation_queue_requests: _QueueLength = 1024
    max_activation_queue_bytes: _QueueBytes = 64 << 20
    tenants_file: Path | None = None
    state_dir: Path | None = None
    socket_dir: Path | None = None
    placement: PlacementMode = "functions"
    mailbox: MailboxMode = "on"
    experts_memory_bytes: _ExpertsBytes | None = None
    router_replicas: _Replicas = 1
    cors_origins: _Origins = ()
    generation_config: GenerationConfigMode = "auto"
    connect_timeout_s: _CallSeconds = 1.0
    call_timeout_s: _CallSeconds = 10.0
    layer_timeout_s: _CallSeconds = 30.0
    request_timeout_s: _RequestSeconds = 3600.0
    keep_alive_s: _KeepAliveSeconds = 75.0
    max_connections: _Connections = MAX_CONNECTIONS
    max_connections_per_address: _Connections = MAX_CONNECTIONS_PER_ADDRESS
    listen_path: Path | None = None
    front_token: str = Field(default="", repr=False)
    metrics_port: _MetricsPort | None = None
    niceness: _Niceness = 0
    metrics_min_tokens: _MinTokens = 256
    drain_timeout_s: _DrainSeconds = 20.0
    tls_folder: Path | None = None
    tls_namespace: _Namespace = DEFAULT_NAMESPACE

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Read the settings; an empty variable counts as not set.

        Raises:
            RouterConfigError: a setting is missing or invalid; the message names the variable.
        """
        try:
            return cls(**read_variables(cls.model_fields, env, prefix=PREFIX))
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            message = describe_setting_error(detail, cls.model_fields, prefix=PREFIX)
            raise RouterConfigError(message) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the constructor's arguments only: `from_env` reads the environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_table_source(self) -> Self:
        if self.table is None and self.control_url is None:
            raise ValueError("FAASMOE_TABLE: not set, expected it or FAASMOE_CONTROL_URL")
        if self.table is not None and self.control_url is not None:
            raise ValueError(
                "FAASMOE_CONTROL_URL: got it and FAASMOE_TABLE, expected only one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.tls_folder and self.control_url and not self.control_url.startswith("https:"):
            raise ValueError(
                f"{PREFIX}CONTROL_URL: got {self.control_url}, expected https with "
                f"{PREFIX}TLS_FOLDER"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "transformers" and self.engine_args != VllmArguments():
            given = self.engine_args.model_dump(exclude_none=True)
            raise ValueError(
                f"{PREFIX}ENGINE_ARGS: got {', '.join(given)}, expected nothing with "
                f"{PREFIX}ENGINE=transformers"
            )
        if self.engine == "vllm" and self.compute != "auto":
            raise ValueError(
                f"{PREFIX}COMPUTE: got {self.compute}, expected auto with {PREFIX}ENGINE=vllm"
            )
        return self

    @model_validator(mode="after")
    def _check_nested_timeouts(self) -> Self:
        names = ("connect", "call", "layer", "request")
        for inner, outer in itertools.pairwise(names):
            inner_s, outer_s = (getattr(self, f"{name}_timeout_s") for name in (inner, outer))
            if inner_s > outer_s:
                raise ValueError(
                    f"{PREFIX}{inner.upper()}_TIMEOUT: got {inner_s:g}, expected at most "
                    f"{PREFIX}{outer.upper()}_TIMEOUT, {outer_s:g}, which it is part of"
                )
        return self


def open_tls_folder(config: RouterConfig) -> TlsFolder | None:
    """Return the folder of FAASMOE_TLS_FOLDER, if it is set; raises RouterConfigError."""
    try:
        return None if config.tls_folder is None else TlsFolder(config.tls_folder)
    except TlsError as error:
        raise RouterConfigError(f"{PREFIX}TLS_FOLDER: {error}") from error
