"""The router process: store, dispatch, model, engine and API put together from the settings."""

import logging
import re
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from faasmoe_expert.config import ConfigError as DeviceError
from faasmoe_expert.device import resolve_device
from faasmoe_expert.store import Store, StoreError
from faasmoe_expert.table import FunctionTable, TableError
from faasmoe_router.api.app import create_app
from faasmoe_router.config import PREFIX, RouterConfig
from faasmoe_router.control import ControlLink, LinkSettings
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.gate import HoldLimits
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.control.waker import Waker
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.calls import Timeouts
from faasmoe_router.dispatch.holding import Holding
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.staging import HostStage, stage_beside
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.model import ModelError, load_router_model
from faasmoe_router.engine.sizing import EngineLimits, Geometry
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import ConfigError
from faasmoe_router.fingerprint import fingerprint
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.serving import Server
from faasmoe_router.tenants.costs import Cost, CostReader
from faasmoe_router.tenants.directory import Directory
from faasmoe_router.tenants.held import HeldLimits
from faasmoe_router.tenants.tenancy import Spending, Tenancy
from faasmoe_router.tenants.usage import Accounts
from faasmoe_router.tenants.usage_file import UsageFile

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 8192


class RouterProcess:
    """One router, ready to serve.

    Raises:
        ConfigError: the store, the table or a limit cannot be used; the message names the variable.
    """

    def __init__(self, config: RouterConfig) -> None:
        device = _device(config.device)
        stage = stage_beside(device)
        registry = new_registry()
        directory = None if config.tenants_file is None else Directory(config.tenants_file)
        store = _open_store(config.store)
        if config.control_url is None:
            link = None
            self._dispatcher = _make_dispatcher(store, config, DispatchMetrics(registry), stage)
        else:
            self._dispatcher, link = _link(store, config, config.control_url, registry, stage)
        self._link = link
        try:
            model = load_router_model(store, self._dispatcher, device=device)
        except ModelError as error:
            raise ConfigError(f"FAASMOE_STORE: {error}") from error
        model_name = config.model_name or Path(store.manifest.model.source).name
        self._gave_up = False
        self._engine = Engine(
            model,
            _open_codec(config.store / "model"),
            limits=_limits(config, model),
            metrics=EngineMetrics(registry, model_name),
            on_give_up=self._give_up,
            on_idle=self._dispatcher.rest,
            request_timeout_s=config.request_timeout_s,
        )
        if link is not None:
            link.is_busy = lambda: self._engine.busy
        tenancy = None
        if directory is not None:
            tenancy = _tenancy(directory, config, store, self._dispatcher, queue=self._engine)
            tenancy.collector().register(registry)
            if link is not None:
                link.tenants = tenancy
        app = create_app(
            self._engine,
            model_name=model_name,
            registry=registry,
            admission=link,
            tenancy=tenancy,
            fingerprint=fingerprint(store.manifest.digest, model),
        )
        self._server = Server(
            app, host=config.host, port=config.port, end_running=self._end_running
        )
        logger.info(
            "%s is loaded on %s, for http://%s:%d", model_name, device, config.host, config.port
        )

    def serve(self) -> bool:
        """Serve until SIGTERM or SIGINT; return whether that, and not a failure, was the end."""
        try:
            self._server.run()
        finally:
            self._dispatcher.close()
        return self._server.started and not self._gave_up

    @property
    def stuck(self) -> bool:
        """Whether the engine's thread outlived its time to end."""
        return self._engine.stuck

    def _end_running(self) -> None:
        if self._link is not None:
            self._link.end_held()
        self._engine.end_running()

    def _give_up(self) -> None:
        self._gave_up = True
        self._server.should_exit = True


def _open_store(path: Path) -> Store:
    try:
        return Store.open(path)
    except (StoreError, OSError) as error:
        raise ConfigError(f"FAASMOE_STORE: {error}") from error


def _open_codec(path: Path) -> TextCodec:
    try:
        return TextCodec(AutoTokenizer.from_pretrained(path))
    except Exception as error:  # a broken file raises whatever its parser stumbled over
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"FAASMOE_STORE: {path}: no tokenizer can be loaded: {reason}") from error


def _make_dispatcher(
    store: Store, config: RouterConfig, metrics: DispatchMetrics, stage: HostStage | None
) -> Dispatcher:
    assert config.table is not None
    try:
        table = FunctionTable.loads(config.table.read_bytes())
        return Dispatcher(
            store,
            table,
            token=config.token,
            metrics=metrics,
            timeouts=_timeouts(config),
            socket_dir=config.socket_dir,
            stage=stage,
            placement=config.placement,
        )
    except (TableError, OSError) as error:
        raise ConfigError(f"FAASMOE_TABLE: {error}") from error


def _timeouts(config: RouterConfig) -> Timeouts:
    return Timeouts(config.connect_timeout_s, config.call_timeout_s, config.layer_timeout_s)


def _link(
    store: Store,
    config: RouterConfig,
    url: str,
    registry: CollectorRegistry,
    stage: HostStage | None,
) -> tuple[Dispatcher, ControlLink]:
    metrics = ControlMetrics(registry)
    client = ControlClient(url, token=config.token)
    settings = LinkSettings(
        router=_router_name(),
        limits=HoldLimits(
            max_requests=config.max_held_requests,
            max_bytes=config.max_held_bytes,
            timeout_s=config.activation_timeout_s,
        ),
    )
    waker = Waker(client, router=settings.router, metrics=metrics, repeat_s=settings.repeat_s)
    dispatcher = Dispatcher(
        store,
        None,
        token=config.token,
        metrics=DispatchMetrics(registry),
        holding=Holding(waker.want_soon, timeout_s=config.hold_timeout_s),
        timeouts=_timeouts(config),
        socket_dir=config.socket_dir,
        stage=stage,
        placement=config.placement,
    )
    return dispatcher, ControlLink(client, waker, dispatcher, settings=settings, metrics=metrics)


def _tenancy(
    directory: Directory,
    config: RouterConfig,
    store: Store,
    dispatcher: Dispatcher,
    *,
    queue: Engine,
) -> Tenancy:
    file = None if config.state_dir is None else UsageFile(config.state_dir)
    reader = CostReader(store)

    def cost() -> Cost:
        specs = {name: entry.spec for name, entry in dispatcher.routing.entries.items()}
        return reader.take(dispatcher.load.read(time.monotonic()), specs)

    return Tenancy(
        directory,
        Accounts(time.time()) if file is None else file.load(),
        queue=queue,
        spending=Spending(cost, queue.computed.take),
        file=file,
        held=HeldLimits(config.max_held_requests, config.max_held_bytes),
        n_routers=config.router_replicas,
    )


def _router_name() -> str:
    """Return a name that no router has had: 1 to 64 letters, digits, dots, dashes."""
    host = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())
    return f"{host[:40]}-{secrets.token_hex(4)}"


def _device(wanted: str) -> torch.device:
    try:
        return resolve_device(wanted)
    except DeviceError as error:
        raise ConfigError(str(error)) from error


def _limits(config: RouterConfig, model: Any) -> EngineLimits:
    made_for: int = model.config.get_text_config().max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > made_for:
        raise ConfigError(
            f"FAASMOE_MAX_MODEL_LEN: got {config.max_model_len}, expected at most {made_for}, "
            "which the model was made for"
        )
    try:
        limits = EngineLimits(
            max_model_len=config.max_model_len or min(made_for, DEFAULT_MODEL_LEN),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            kv_cache_bytes=config.kv_cache_bytes,
        )
        limits.n_pages(Geometry.of(model))
    except ConfigError as error:
        field, _, fault = str(error).partition(":")
        raise ConfigError(f"{PREFIX}{field.upper()}:{fault}") from error
    return limits
