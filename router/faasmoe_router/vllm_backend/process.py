"""The router process with vLLM: builds tenants, link, engine and API from the settings.

vLLM computes in processes of its own, whose plugin calls the functions (`expert_calls`). This
process has the API: vLLM's OpenAI app behind the router's tenants and activator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path

from fastapi import FastAPI
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError

from faasmoe_contracts.start_phases import StartPhases
from faasmoe_contracts.store import Store
from faasmoe_router.api.admission import AlwaysActivated
from faasmoe_router.api.errors import add_router_error_handler
from faasmoe_router.api.http_server import create_http_server
from faasmoe_router.api.metrics_server import MetricsServer
from faasmoe_router.config import RouterConfig
from faasmoe_router.control import ControlLink
from faasmoe_router.data_plane import (
    create_front_link,
    create_tenant_service,
    open_store,
    read_tenants,
)
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.registry import TenantRegistry
from faasmoe_router.tenants.service import NoTenants, TenantService
from faasmoe_router.tenants.usage import FunctionCost
from faasmoe_router.thread_priority import lower_priority_later
from faasmoe_router.version import system_fingerprint_of
from faasmoe_router.vllm_backend.app import EngineState, create_app
from faasmoe_router.vllm_backend.engine_arguments import parse_engine_arguments
from faasmoe_router.vllm_backend.engine_client import TenantEngine
from faasmoe_router.vllm_backend.engine_process import EngineProcess
from faasmoe_router.vllm_backend.fair_gate import FairGate
from faasmoe_router.vllm_backend.idle_releases import IdleMemory, IdleReleases
from faasmoe_router.vllm_backend.metrics import JoinedRegistry
from faasmoe_router.vllm_backend.routing_view import RoutingView
from faasmoe_router.vllm_backend.tenant_middleware import TenantMiddleware
from faasmoe_tracing import create_tracer
from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.version_check import VLLM_MODULES, check_private_names

logger = logging.getLogger(__name__)

WORKER_POLL_S = 1.0
IDLE_RELEASE_S = 10.0
PREFIX_CACHE_RELEASE_S = 60.0
"""With a prefix cache: cached prompts are worth more than the memory they take."""
ENGINE_WATCH_S = 0.2
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nothing leaves the machine
    "VLLM_ENABLE_RESPONSES_API_STORE": "0",  # stored responses would be everyone's
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU: the engine's process computes, no third one
    "HF_HUB_OFFLINE": "1",
}


class VllmRouterProcess:
    """One router with vLLM's engine, ready to serve.

    Args:
        config: the router's settings.
        phases: the phases of the start so far; logged when the server listens.

    Raises:
        RouterConfigError: the store, a limit or an argument of the engine cannot be used.
    """

    def __init__(self, config: RouterConfig, phases: StartPhases) -> None:
        os.environ.update({k: v for k, v in VLLM_ENVIRONMENT.items() if k not in os.environ})
        _check_libraries()
        self._phases, self._niceness = phases, config.niceness
        self._has_given_up = False
        self._registry = JoinedRegistry()
        store = open_store(config.store)
        tenants_registry = read_tenants(config)
        phases.end("store")
        model_name = config.model_name or Path(store.manifest.model.source).name
        self._arguments = _arguments(config, store, model_name)
        self._vllm_config = _engine_config(self._arguments)
        phases.end("configuration")
        self._engine_process = EngineProcess(self._vllm_config)
        try:
            self._create_api(config, store, tenants_registry, model_name)
        except BaseException:
            self._engine_process.close()
            raise
        phases.end("api")

    def _create_api(
        self,
        config: RouterConfig,
        store: Store,
        tenants_registry: TenantRegistry | None,
        model_name: str,
    ) -> None:
        self._tracer = create_tracer(os.environ, service="faasmoe-router")
        self._gate = FairGate(slots=config.max_num_seqs, max_waiting=config.max_waiting)
        self._cost = FunctionCost()
        self._state = EngineState()
        self._link = _link(config, store, self._registry)
        if self._link is not None:
            self._link.is_busy = lambda: self._gate.n_requests > 0
        self._tenants: TenantService | None = None
        if tenants_registry is not None:
            self._tenants = create_tenant_service(
                tenants_registry,
                config,
                queue=self._gate,
                read_cost=self._drain_cost,
                read_tokens=self._gate.drain_computed,
            )
            self._tenants.collector().register(self._registry)
            if self._link is not None:
                self._link.tenants = self._tenants
        self._admission = self._tenants or NoTenants()
        self._activator = self._link or AlwaysActivated()
        self._request_timeout_s = config.request_timeout_s
        metrics_server = None
        if config.metrics_port is not None:
            metrics_server = MetricsServer(
                self._registry, host=config.host, port=config.metrics_port
            )
        self._metrics_server = metrics_server
        app = create_app(
            self._state,
            self._lifespan,
            model_name=model_name,
            max_model_len=self._arguments.max_model_len,
            registry=self._registry,
            activator=self._activator,
            admission=self._admission,
            tenancy=self._tenants,
            cors_origins=config.cors_origins,
            front_token=config.front_token,
            serves_metrics=metrics_server is None,
            tracer=self._tracer,
        )
        self._server, self._listeners = create_http_server(
            app, config, on_started=self._log_start, on_drain_timeout=self._abort_running
        )

    @property
    def is_stuck(self) -> bool:
        """False: vLLM's engine is a process, which ends with this one."""
        return False

    def serve(self) -> bool:
        """Serve until SIGTERM or SIGINT; return whether that ended it, rather than a failure."""
        try:
            self._server.run(sockets=self._listeners)
        finally:
            self._tracer.close()
        return self._server.started and not self._has_given_up

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._activator)
            await stack.enter_async_context(self._admission)
            await stack.enter_async_context(self._metrics_server or nullcontext())
            await stack.enter_async_context(self._running_engine())
            tasks = [
                asyncio.create_task(self._watch_engine(), name="engine-watch"),
                asyncio.create_task(self._poll_while_alive(), name="worker-poll"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def _running_engine(self) -> AsyncIterator[None]:
        """Run vLLM's engine and its app for the lifetime of the context."""
        arguments = self._arguments
        with contextlib.closing(self._engine_process):
            engine = await self._join_engine()
            try:
                tasks = await engine.get_supported_tasks()
                app = build_app(arguments, tasks, engine.model_config)
                add_router_error_handler(app)
                await init_app_state(engine, app.state, arguments, tasks)
                async with app.router.lifespan_context(app):
                    self._state.engine = engine
                    self._state.app = TenantMiddleware(
                        app,
                        model_name=arguments.served_model_name[0],
                        activator=self._activator,
                        admission=self._admission,
                    )
                    yield
            finally:
                self._state.app = None
                engine.shutdown(timeout=0)

    async def _join_engine(self) -> TenantEngine:
        """Wait for the engine; return its client."""
        await self._engine_process.wait_started()
        engine = TenantEngine.from_vllm_config(
            self._vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            client_addresses=self._engine_process.client_addresses,
        )
        assert isinstance(engine, TenantEngine)
        self._engine_process.join(engine)
        engine.gate = self._gate
        engine.admission = self._admission
        engine.request_timeout_s = self._request_timeout_s
        await engine.release_cache()  # vLLM wrote zeros to all of it
        return engine

    async def _watch_engine(self) -> None:
        """End the process once the engine has died: another one starts from the beginning."""
        while True:
            await asyncio.sleep(ENGINE_WATCH_S)
            engine = self._state.engine
            if engine is not None and engine.errored:
                logger.critical("vLLM's engine has died; the router ends")
                self._has_given_up = True
                self._server.should_exit = True
                return

    async def _poll_while_alive(self) -> None:
        with contextlib.suppress(EngineDeadError):  # the watch ends the process
            await self._poll_worker()

    async def _poll_worker(self) -> None:
        """Fetch the workers' metrics, and the cost of their calls, while they compute.

        Once they have been idle for a while, they free what they keep for the next requests.
        """
        caches_prefixes = self._vllm_config.cache_config.enable_prefix_caching
        releases = IdleReleases(
            calls_idle_s=IDLE_RELEASE_S,
            cache_idle_s=PREFIX_CACHE_RELEASE_S if caches_prefixes else IDLE_RELEASE_S,
        )
        polled_s = time.monotonic()
        while True:
            await asyncio.sleep(WORKER_POLL_S)
            engine = self._state.engine
            if engine is None or engine.errored:
                continue
            active_s, now_s = self._gate.last_active_s, time.monotonic()
            if active_s > polled_s:
                polled_s = now_s
                await self._read_worker(engine)
            elif not self._gate.n_requests:
                due = releases.due(now_s, active_s)
                if IdleMemory.CALLS in due:
                    await engine.collective_rpc("faasmoe_release_memory")
                if IdleMemory.CACHE in due:
                    await engine.release_cache()

    async def _read_worker(self, engine: TenantEngine) -> None:
        for seconds, gb_seconds in await engine.collective_rpc("faasmoe_cost"):
            self._cost += FunctionCost(seconds, gb_seconds)
        self._registry.worker_text = "".join(await engine.collective_rpc("faasmoe_metrics"))

    def _drain_cost(self) -> FunctionCost:
        cost, self._cost = self._cost, FunctionCost()
        return cost

    def _log_start(self) -> None:
        self._phases.end("engine")
        logger.info("%s", self._phases.describe())
        if self._niceness:
            lower_priority_later(self._niceness)

    def _abort_running(self) -> None:
        if self._link is not None:
            self._link.reject_queued()
        engine = self._state.engine
        if engine is not None:
            running = list(engine.output_processor.request_states)
            self._abort_task = asyncio.ensure_future(engine.abort(running, internal=True))


def _check_libraries() -> None:
    try:
        check_private_names(VLLM_MODULES)
    except UnsupportedVersions as error:
        raise RouterConfigError(f"FAASMOE_ENGINE: {error}") from error


def _arguments(config: RouterConfig, store: Store, model_name: str) -> Namespace:
    device: str = current_platform.device_type
    if config.device not in ("auto", device):
        raise RouterConfigError(
            f"FAASMOE_DEVICE: got {config.device}, expected {device}, which the installed vLLM "
            "computes on"
        )
    fingerprint = system_fingerprint_of(
        store.manifest.digest, config.dtype, device, ("torch", "transformers", "vllm")
    )
    return parse_engine_arguments(
        config, store, device, model_name=model_name, fingerprint=fingerprint
    )


def _engine_config(arguments: Namespace) -> VllmConfig:
    """Return vLLM's configuration; raises RouterConfigError with vLLM's reason."""
    try:
        return AsyncEngineArgs.from_cli_args(arguments).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
    except ValueError as error:  # pydantic's errors included
        reason = " ".join(str(error).split())
        raise RouterConfigError(f"FAASMOE_ENGINE: vLLM refuses its arguments: {reason}") from error


def _link(config: RouterConfig, store: Store, registry: JoinedRegistry) -> ControlLink | None:
    if config.control_url is None:
        return None
    view = RoutingView(store)
    return create_front_link(view, config, config.control_url, registry, store=store)
