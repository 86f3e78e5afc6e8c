"""A store with a tokenizer, a control process and whole routers, all of them real but tiny."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from control_stand_in import ControlStandIn
from prometheus_client import CollectorRegistry
from sandboxes import OpenSandbox, SandboxProcess, block_specs
from server_thread import running_server

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionTable
from faasmoe_router.api.app import create_app
from faasmoe_router.checkpoint import prepare
from faasmoe_router.control import ControlLink, LinkSettings
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.control.gate import HoldLimits
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.control.waker import Waker
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.holding import Holding
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.model import load_router_model
from faasmoe_router.engine.sizing import EngineLimits
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.serving import Server

DEADLINE_S = 20.0
TOKEN = "secret"


@pytest.fixture(scope="session")
def store(base_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("elastic")
    base_model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return prepare(str(folder / "checkpoint"), folder / "store")


@pytest.fixture(scope="session")
def cold_table(store: Store) -> FunctionTable:
    """Four functions, two experts each, none of which has an address."""
    entries = tuple(FunctionEntry(spec) for spec in block_specs(store, 2))
    return FunctionTable(store.manifest.digest, 1, entries)


@pytest.fixture
def control(cold_table: FunctionTable) -> Iterator[ControlStandIn]:
    with ControlStandIn(cold_table, token=TOKEN).running() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def box(sandbox: OpenSandbox) -> Iterator[SandboxProcess]:
    with sandbox(capacity=9, token=TOKEN) as process:
        yield process


@pytest.fixture
def warm(store: Store, box: SandboxProcess, cold_table: FunctionTable) -> dict[str, list[str]]:
    """Addresses of all functions, in a sandbox where they are attached."""
    entries = [box.attach(store, entry.spec) for entry in cold_table.functions]
    return {entry.spec.id: list(entry.addresses) for entry in entries}


@dataclass(frozen=True, slots=True)
class ElasticRouter:
    """A router that serves, linked to a control process."""

    http: httpx.Client
    registry: CollectorRegistry
    server: Server

    def metric(self, name: str) -> float:
        """Return a metric's value now."""
        return self.registry.get_sample_value(f"faasmoe_router_{name}") or 0.0

    def complete(self, **fields: Any) -> httpx.Response:
        """Ask for a completion."""
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
        return self.http.post("/v1/completions", json=body | fields)


OpenRouter = Callable[..., AbstractContextManager[ElasticRouter]]


@pytest.fixture
def router(store: Store, codec: TextCodec, control: ControlStandIn) -> OpenRouter:
    """Runs a router: `with router(timeout_s=…, hold_timeout_s=…) as r: r.complete()`."""

    @contextmanager
    def run(
        *, hold_timeout_s: float = 2.0, repeat_s: float = 0.2, **limits: Any
    ) -> Iterator[ElasticRouter]:
        registry = new_registry()
        metrics = ControlMetrics(registry)
        client = ControlClient(control.url, token=TOKEN, timeouts=ControlTimeouts(silence_s=1.0))
        settings = LinkSettings(
            "router", limits=HoldLimits(**limits), report_interval_s=0.1, repeat_s=repeat_s
        )
        waker = Waker(client, router="router", metrics=metrics, repeat_s=settings.repeat_s)
        dispatcher = Dispatcher(
            store,
            None,
            token=TOKEN,
            metrics=DispatchMetrics(registry),
            holding=Holding(waker.want_soon, timeout_s=hold_timeout_s, probe_s=0.02),
        )
        link = ControlLink(client, waker, dispatcher, settings=settings, metrics=metrics)
        engine = Engine(
            load_router_model(store, dispatcher, device=torch.device("cpu")),
            codec,
            limits=EngineLimits(max_model_len=256),
            metrics=EngineMetrics(registry, "tiny"),
        )

        def end_running() -> None:
            link.end_held()
            engine.end_running()

        app = create_app(engine, model_name="tiny", registry=registry, admission=link)
        server = Server(app, end_running=end_running, drain_s=0)
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
    """Run a coroutine function to its end, or fail."""

    def run(tell: Callable[[], Any]) -> None:
        async def told() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await tell()

        asyncio.run(told())

    return run
