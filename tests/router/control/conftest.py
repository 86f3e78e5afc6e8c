"""A tiny store with a tokenizer, a fake control process, and routers that are linked to it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_control import FakeControl
from metric_samples import sample_value
from prometheus_client import CollectorRegistry
from sandbox_processes import SandboxProcess, StartSandbox, block_specs
from server_thread import running_server

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.control import ControlLink, LinkSettings
from faasmoe_router.control.activator import ActivationQueueLimits, ActivationRequester
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.model_loader import load_router_model

DEADLINE_S = 120.0
TOKEN = "secret"


@pytest.fixture(scope="session")
def store(base_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("elastic")
    base_model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return prepare(str(folder / "checkpoint"), folder / "store")


@pytest.fixture(scope="session")
def cold_table(store: Store) -> RoutingTable:
    """Four functions of two experts each, without addresses."""
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 2))
    return RoutingTable(store.manifest.digest, 1, entries)


@pytest.fixture
def control(cold_table: RoutingTable) -> Iterator[FakeControl]:
    with FakeControl(cold_table, token=TOKEN).running() as fake:
        yield fake


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    with sandbox(capacity=9, token=TOKEN) as process:
        yield process


@pytest.fixture
def warm(
    store: Store, sandbox_server: SandboxProcess, cold_table: RoutingTable
) -> dict[str, list[str]]:
    """Addresses of all functions, attached in a sandbox."""
    entries = [sandbox_server.attach(store, entry.spec) for entry in cold_table.functions]
    return {entry.spec.id: list(entry.addresses) for entry in entries}


@dataclass(frozen=True, slots=True)
class ElasticRouter:
    """A running router that is linked to a control process."""

    http: httpx.Client
    registry: CollectorRegistry
    server: Server

    def metric(self, name: str) -> float:
        """Return the current value of a metric; an unknown name is an error."""
        return sample_value(self.registry, f"faasmoe_router_{name}")

    def complete(self, **fields: Any) -> httpx.Response:
        """Request a completion."""
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
        return self.http.post("/v1/completions", json=body | fields)


OpenRouter = Callable[..., AbstractContextManager[ElasticRouter]]


@pytest.fixture
def router(store: Store, model_tokenizer: ModelTokenizer, control: FakeControl) -> OpenRouter:
    """Runs a router: `with router(timeout_s=…, call_queue_timeout_s=…) as r: r.complete()`."""

    @contextmanager
    def run(
        *,
        call_queue_timeout_s: float = 2.0,
        replacement_timeout_s: float = 0.0,
        repeat_s: float = 0.2,
        computes_overflow: bool = False,
        **limits: Any,
    ) -> Iterator[ElasticRouter]:
        registry = new_registry()
        metrics = ControlLinkMetrics(registry)
        client = ControlClient(
            control.url, token=TOKEN, timeouts=ControlTimeouts(stream_idle_s=1.0)
        )
        settings = LinkSettings(
            "router",
            queue_limits=ActivationQueueLimits(**limits),
            report_interval_s=0.1,
            activation_repeat_s=repeat_s,
            queues_requests=not computes_overflow,
        )
        activation_requester = ActivationRequester(
            client, router_name="router", metrics=metrics, repeat_s=settings.activation_repeat_s
        )
        dispatcher = Dispatcher(
            store,
            None,
            token=TOKEN,
            metrics=DispatchMetrics(registry),
            activation=ActivationSettings(
                activation_requester.request_threadsafe,
                timeout_s=call_queue_timeout_s,
                retry_interval_s=0.02,
                replacement_timeout_s=replacement_timeout_s,
            ),
            computes_overflow=computes_overflow,
        )
        link = ControlLink(
            client, activation_requester, dispatcher, settings=settings, metrics=metrics
        )
        engine = Engine(
            load_router_model(store, dispatcher, device=torch.device("cpu")),
            model_tokenizer,
            limits=EngineLimits(max_model_len=256),
            metrics=EngineMetrics(registry, "tiny"),
        )

        def abort_running() -> None:
            link.reject_queued()
            engine.abort_running()

        app = create_app(engine, model_name="tiny", registry=registry, activator=link)
        server = Server(app, on_drain_timeout=abort_running, drain_timeout_s=0)
        try:
            with (
                running_server(server) as url,
                httpx.Client(base_url=url, timeout=DEADLINE_S) as http,
            ):
                yield ElasticRouter(http, registry, server)
        finally:
            dispatcher.close()

    return run


@pytest.fixture
def on_loop() -> Callable[[Callable[[], Any]], None]:
    """Runs a coroutine function with a deadline."""

    def run(scenario: Callable[[], Any]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await scenario()

        asyncio.run(bounded())

    return run
