"""The router process: builds store, dispatch, model, engine and API from the settings."""

import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faasmoe_contracts.start_phases import StartPhases
from faasmoe_contracts.store import Store
from faasmoe_expert.config import SandboxConfigError as DeviceError
from faasmoe_expert.device import resolve_device
from faasmoe_expert.malloc import trim_heap
from faasmoe_kernels import describe_cpu_kernels
from faasmoe_router.api.app import create_app
from faasmoe_router.api.http_server import create_http_server
from faasmoe_router.api.metrics_server import MetricsServer
from faasmoe_router.compute_dtype import select_compute_dtype
from faasmoe_router.config import PREFIX, RouterConfig
from faasmoe_router.data_plane import (
    create_dispatcher,
    create_tenant_service,
    open_store,
    read_tenants,
)
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.device_transfer import transfer_for
from faasmoe_router.engine.batcher import EngineLimits, KVCacheGeometry
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.engine.tokenizer_cache import TOKENIZERS
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.model_loader import ModelLoadError, load_router_model
from faasmoe_router.tenants.usage import FunctionCost, FunctionCostMeter
from faasmoe_router.thread_priority import lower_priority_later
from faasmoe_router.version import system_fingerprint
from faasmoe_tracing import create_tracer

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 8192


class RouterProcess:
    """One router, ready to serve.

    Args:
        config: the router's settings.
        phases: the phases of the start so far; logged when the server listens.

    Raises:
        RouterConfigError: the store, the routing table or a limit cannot be used; the message names
            the variable.
    """

    def __init__(self, config: RouterConfig, phases: StartPhases) -> None:
        device = _resolve_device(config.device)
        host_buffers = transfer_for(device)
        registry = new_registry()
        self._tracer = create_tracer(os.environ, service="faasmoe-router")
        tenant_registry = read_tenants(config)
        store = open_store(config.store)
        self._dispatcher, link = create_dispatcher(store, config, registry, host_buffers)
        self._link = link
        phases.end("store")
        try:
            model = load_router_model(
                store,
                self._dispatcher,
                device=device,
                dtype=_select_dtype(config, store, device),
                compute=config.compute,
            )
        except ModelLoadError as error:
            raise RouterConfigError(f"FAASMOE_STORE: {error}") from error
        phases.end("model")
        model_name = config.model_name or Path(store.manifest.model.source).name
        self._has_given_up = False
        tokenizer = _load_tokenizer(config.store / "model")
        phases.end("tokenizer")
        self._engine = Engine(
            model,
            tokenizer,
            limits=_engine_limits(config, model),
            metrics=EngineMetrics(registry, model_name),
            on_give_up=self._on_engine_give_up,
            on_idle=self._dispatcher.release_memory,
            request_timeout_s=config.request_timeout_s,
            compute=config.compute,
        )
        self._dispatcher.show_calls_late(
            lambda: self._engine.metrics.n_computed_tokens, min_tokens=config.metrics_min_tokens
        )
        if link is not None:
            link.is_busy = lambda: self._engine.is_busy
            self._engine.metrics.observe_held(lambda: link.n_held)
        tenants = None
        if tenant_registry is not None:
            tenants = create_tenant_service(
                tenant_registry,
                config,
                queue=self._engine,
                read_cost=_cost_reader(store, self._dispatcher),
                read_tokens=self._engine.computed_tokens.drain,
            )
            tenants.collector().register(registry)
            if link is not None:
                link.tenants = tenants
        app = create_app(
            self._engine,
            model_name=model_name,
            registry=registry,
            activator=link,
            tenancy=tenants,
            fingerprint=system_fingerprint(store.manifest.digest, model),
            cors_origins=config.cors_origins,
            sampling_defaults=_sampling_defaults(config),
            front_token=config.front_token,
            tracer=self._tracer,
            metrics_server=None
            if config.metrics_port is None
            else MetricsServer(registry, host=config.host, port=config.metrics_port),
        )
        self._phases, self._niceness = phases, config.niceness
        self._server, self._listeners = create_http_server(
            app, config, on_started=self._log_start, on_drain_timeout=self._abort_running
        )
        phases.end("api")
        logger.info(
            "%s is loaded on %s, for %s",
            model_name,
            device,
            config.listen_path or f"http://{config.host}:{config.port}",
        )

    def serve(self) -> bool:
        """Serve until SIGTERM or SIGINT; return whether that ended it, rather than a failure."""
        gc.collect()
        gc.freeze()  # model and libraries: a collection of all their objects would stall the loop
        trim_heap()  # what loading has left: half of a tokenizer's memory and more
        try:
            self._server.run(sockets=self._listeners)
        finally:
            self._dispatcher.close()
            self._tracer.close()
        return self._server.started and not self._has_given_up

    @property
    def is_stuck(self) -> bool:
        """Whether the engine's thread did not end in time and was abandoned."""
        return self._engine.is_stuck

    def _log_start(self) -> None:
        self._phases.end("engine")
        logger.info("%s", self._phases.describe())
        if self._niceness:
            lower_priority_later(self._niceness)

    def _abort_running(self) -> None:
        if self._link is not None:
            self._link.reject_queued()
        self._engine.abort_running()

    def _on_engine_give_up(self) -> None:
        self._has_given_up = True
        self._server.should_exit = True


def _sampling_defaults(config: RouterConfig) -> SamplingDefaults:
    if config.generation_config == "none":
        return SamplingDefaults()
    return SamplingDefaults.read(config.store / "model")


def _load_tokenizer(path: Path) -> ModelTokenizer:
    try:
        return TOKENIZERS.get(path)
    except Exception as error:  # a broken file raises whatever its parser does
        reason = str(error).partition("\n")[0]
        raise RouterConfigError(
            f"FAASMOE_STORE: {path}: no tokenizer can be loaded: {reason}"
        ) from error


def _cost_reader(store: Store, dispatcher: Dispatcher) -> Callable[[], FunctionCost]:
    cost_meter = FunctionCostMeter(store)

    def read_cost() -> FunctionCost:
        specs = {name: entry.spec for name, entry in dispatcher.routing.entries.items()}
        return cost_meter.read_delta(dispatcher.load.snapshot(time.monotonic()), specs)

    return read_cost


def _resolve_device(requested: str) -> torch.device:
    try:
        return resolve_device(requested)
    except DeviceError as error:
        raise RouterConfigError(str(error)) from error


def _select_dtype(config: RouterConfig, store: Store, device: torch.device) -> torch.dtype:
    selected = select_compute_dtype(config.dtype, store, device, compute=config.compute)
    dtype_name = str(selected.dtype).removeprefix("torch.")
    logger.info("The router computes in %s: %s", dtype_name, selected.reason)
    if device.type == "cpu" and selected.dtype is torch.float32 and config.compute != "torch":
        logger.info("Kernels of the router: %s", describe_cpu_kernels())
    return selected.dtype


def _engine_limits(config: RouterConfig, model: Any) -> EngineLimits:
    model_max_len: int = model.config.get_text_config().max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > model_max_len:
        raise RouterConfigError(
            f"FAASMOE_MAX_MODEL_LEN: got {config.max_model_len}, expected at most {model_max_len}, "
            "the model's context length"
        )
    try:
        limits = EngineLimits(
            max_model_len=config.max_model_len or min(model_max_len, DEFAULT_MODEL_LEN),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            kv_cache_bytes=config.kv_cache_bytes,
        )
        limits.n_pages(KVCacheGeometry.from_model(model))
    except RouterConfigError as error:
        field, _, reason = str(error).partition(":")
        raise RouterConfigError(f"{PREFIX}{field.upper()}:{reason}") from error
    return limits
