"""Routers with tenants and the tiny model, served on loopback ports."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from metric_samples import sample_value
from prometheus_client import CollectorRegistry
from server_thread import running_server

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.tenants.registry import TenantRegistry
from faasmoe_router.tenants.service import TenantService, UsageSources
from faasmoe_router.tenants.usage import FunctionCost, RouterUsage
from faasmoe_router.tenants.usage_store import UsageFileStore

DEADLINE_S = 120.0
MODEL = "tiny"


class TenantFiles:
    """A tenants file and its folders of keys; the first key of a tenant is `NAME-key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tenants.json"

    def write(self, tenants: dict[str, dict[str, Any]], **fields: Any) -> None:
        given = [
            {"name": name, "keysPath": str(self.folder / "keys" / name), **more}
            for name, more in tenants.items()
        ]
        for name in tenants:
            if not (self.folder / "keys" / name).exists():
                self.keys(name, f"{name}-key")
        content = json.dumps({"version": 1, "model": MODEL, "tenants": given, **fields})
        (self.folder / "new").write_text(content)
        (self.folder / "new").replace(self.path)

    def keys(self, tenant: str, *keys: str) -> None:
        """Replace all keys of a tenant atomically, as a kubelet does."""
        folder = self.folder / "keys" / tenant
        version = self.folder / "keys" / f".{tenant}-{time.monotonic_ns()}"
        version.mkdir(parents=True)
        for number, key in enumerate(keys):
            (version / f"key{number}").write_text(f"{key}\n")
        link = self.folder / "keys" / f".{tenant}-link"
        link.symlink_to(version)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        link.replace(folder)


@dataclass(frozen=True, slots=True)
class TenantRouter:
    """A running router with tenants."""

    url: str
    files: TenantFiles
    engine: Engine
    tenancy: TenantService
    usage_counters: RouterUsage
    registry: CollectorRegistry
    server: Server

    @contextmanager
    def client(self, tenant: str, *, key: str | None = None, path: str = "") -> Iterator[Any]:
        """Open a tenant's OpenAI client, by default at /v1 with the tenant's first key."""
        with openai.OpenAI(
            base_url=f"{self.url}{path}/v1",
            api_key=key or f"{tenant}-key",
            max_retries=0,
            timeout=DEADLINE_S,
        ) as client:
            yield client

    def post(self, path: str, *, key: str | None, **fields: Any) -> httpx.Response:
        """Request a completion by plain HTTP."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"model": MODEL, "prompt": "the quick", "max_tokens": 4, "temperature": 0, **fields}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=DEADLINE_S)

    def complete(self, tenant: str, **fields: Any) -> httpx.Response:
        """Request a completion as a tenant."""
        return self.post("/v1/completions", key=f"{tenant}-key", **fields)

    def get(self, path: str, *, key: str | None = None) -> httpx.Response:
        """Send a GET request."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=DEADLINE_S)

    def usage(self, tenant: str) -> dict[str, Any]:
        """Return the body of a tenant's usage endpoint."""
        usage: dict[str, Any] = self.get("/v1/usage", key=f"{tenant}-key").json()
        return usage

    def metric(self, name: str, **labels: str) -> float:
        """Return the current value of a metric, 0 if it has no such labels."""
        return sample_value(self.registry, f"faasmoe_tenant_{name}", labels)


OpenRouter = Callable[..., AbstractContextManager[TenantRouter]]


class _FixedCost:
    """Returns the same cost at every reading."""

    def __init__(self) -> None:
        self.each = FunctionCost(0.25, 0.5)

    def __call__(self) -> FunctionCost:
        return self.each


@pytest.fixture(scope="session")
def open_router(
    base_model: Any, model_tokenizer: ModelTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> OpenRouter:
    """Runs a router: `with open_router({"acme": {"weight": 2}}, max_num_seqs=2) as r: …`."""

    @contextmanager
    def run(
        tenants: dict[str, dict[str, Any]],
        *,
        n_routers: int = 1,
        state_dir: Path | None = None,
        document: dict[str, Any] | None = None,
        **limits: int,
    ) -> Iterator[TenantRouter]:
        files = TenantFiles(tmp_path_factory.mktemp("router"))
        files.write(tenants, **(document or {}))
        registry = new_registry()
        engine = Engine(
            deepcopy(base_model),
            model_tokenizer,
            limits=EngineLimits(**{"max_model_len": 256, **limits}),
            metrics=EngineMetrics(registry, MODEL),
        )
        store = None if state_dir is None else UsageFileStore(state_dir)
        usage = RouterUsage(time.time()) if store is None else store.load()
        tenancy = TenantService(
            TenantRegistry(files.path, refresh_interval_s=0.1),
            usage,
            queue=engine,
            usage_sources=UsageSources(_FixedCost(), engine.computed_tokens.drain),
            store=store,
            n_routers=n_routers,
        )
        tenancy.collector().register(registry)
        app = create_app(engine, model_name=MODEL, registry=registry, tenancy=tenancy)
        server = Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
        with running_server(server) as url:
            yield TenantRouter(url, files, engine, tenancy, usage, registry, server)

    return run
