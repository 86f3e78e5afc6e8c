"""Gateway, router and sandbox as processes that reach each other over TLS alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from faasmoe_up import free_port
from metric_samples import parse_sample
from sandbox_processes import StartSandbox
from tls_folders import MODELS, kubelet_context, tls_peer, write_tls_folder

from faasmoe_contracts.gateway_file import GatewayFile, ModelEntry, RouterEntry
from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import GATEWAY_NAME, OPERATOR_NAME

DEADLINE_S = 300.0
TOKEN, FRONT_TOKEN = "secret", "front"
BODY = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "temperature": 0}


@dataclass(frozen=True, slots=True)
class System:
    """The processes.

    Attributes:
        gateway: URL of the gateway, which speaks plain HTTP to clients.
        router: HOST:PORT of the router.
        metrics: URL of the router's metrics.
        folders: the certificates of each process, and their names.
    """

    gateway: str
    router: str
    metrics: str
    folders: dict[Path, str]


@contextmanager
def process(module: str, log: Path, **settings: object) -> Iterator[None]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name}": str(value) for name, value in settings.items()}
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", module],
            env={**env, PARENT_PID_ENV: str(os.getpid())},
            stdout=output,
            stderr=output,
        )
    try:
        yield
        assert started.poll() is None, log.read_text()
    finally:
        started.terminate()
        try:
            started.wait(DEADLINE_S)
        finally:
            started.kill()


def wait_until_ready(get: Callable[[], httpx.Response], log: Path) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            if get().status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < end_s, log.read_text()
        time.sleep(0.05)


@pytest.fixture
def system(store: Store, sandbox: StartSandbox, tmp_path: Path) -> Iterator[System]:
    names = {"sandbox": MODELS, "router": MODELS, "gateway": GATEWAY_NAME}
    folders = {name: write_tls_folder(tmp_path / name, names[name]) for name in names}
    operator = tls_peer(tmp_path / "operator", OPERATOR_NAME)
    port, metrics_port, gateway_port = free_port(), free_port(), free_port()
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        running = stack.enter_context(
            sandbox(capacity=9, token=TOKEN, tls=operator, tls_folder=folders["sandbox"])
        )
        table, file = tmp_path / "table.json", tmp_path / "gateway.json"
        table.write_text(json.dumps(running.attach_blocks(store, 2).to_json()))
        router_log, gateway_log = tmp_path / "router.log", tmp_path / "gateway.log"
        stack.enter_context(
            process(
                "faasmoe_router",
                router_log,
                STORE=store.path,
                TABLE=table,
                TOKEN=TOKEN,
                FRONT_TOKEN=FRONT_TOKEN,
                MODEL_NAME="tiny",
                DEVICE="cpu",
                PORT=port,
                METRICS_PORT=metrics_port,
                METRICS_MIN_TOKENS=1,
                TLS_FOLDER=folders["router"],
            )
        )
        client = stack.enter_context(
            httpx.Client(verify=kubelet_context(), trust_env=False, timeout=DEADLINE_S)
        )
        wait_until_ready(lambda: client.get(f"https://{address}/health"), router_log)
        routers = (RouterEntry("a", address),)
        entry = ModelEntry("tiny", "tiny", 64, routers, FRONT_TOKEN, MODELS)
        file.write_bytes(GatewayFile((entry,), ()).dumps())
        stack.enter_context(
            process(
                "faasmoe_gateway",
                gateway_log,
                GATEWAY_FILE=file,
                FRONT_TOKEN="of-no-model",
                PORT=gateway_port,
                TLS_FOLDER=folders["gateway"],
            )
        )
        url = f"http://127.0.0.1:{gateway_port}"
        wait_until_ready(lambda: client.get(f"{url}/health"), gateway_log)
        yield System(
            url,
            address,
            f"http://127.0.0.1:{metrics_port}/metrics",
            {folders[name]: names[name] for name in names},
        )


def complete(system: System) -> str:
    response = httpx.post(
        f"{system.gateway}/v1/completions", json=BODY, timeout=DEADLINE_S, trust_env=False
    )
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def received_bytes(system: System) -> float:
    """Return what the router has got from functions."""
    text = httpx.get(system.metrics, timeout=DEADLINE_S, trust_env=False).text
    return parse_sample(text, "faasmoe_router_function_received_bytes_total")


def test_a_request_crosses_all_of_them_and_a_rotation_loses_none(system: System) -> None:
    expected = complete(system)
    for number in range(3):
        for folder, name in system.folders.items():
            write_tls_folder(folder, name, f"{number}.faasmoe.internal")
        assert [complete(system) for _ in range(3)] == [expected] * 3
    assert received_bytes(system) > 0
    with pytest.raises(httpx.TransportError):  # without TLS
        httpx.post(
            f"http://{system.router}/v1/completions", json=BODY, timeout=120, trust_env=False
        )
