import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry

DEADLINE_S = 120.0
SERVE_UNTIL_SIGNAL = """
from faasmoe_gateway.server import Server

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        print("started", flush=True)
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

Server(
    app, on_drain_timeout=lambda: None, on_started=lambda: print("listens", flush=True)
).run()
print("after", flush=True)
"""


def test_server_without_clients_ends_at_once_on_a_signal() -> None:
    lazily = "import faasmoe_gateway.server\nfaasmoe_gateway.server.TICK_S = 1e6\n"
    with subprocess.Popen(
        [sys.executable, "-c", lazily + SERVE_UNTIL_SIGNAL], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert process.stdout.readline() == "listens\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert process.stdout.read() == "after\n"


def test_responses_beyond_the_drain_timeout_end_with_an_error(
    model: Any, model_tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = new_registry()
    engine = Engine(
        model,
        model_tokenizer,
        limits=EngineLimits(max_model_len=256),
        metrics=EngineMetrics(registry, "tiny"),
    )
    release = threading.Event()
    forward = model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        release.wait(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    app = create_app(engine, model_name="tiny", registry=registry)
    server = Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        body = {"model": "tiny", "prompt": "a", "stream": True}
        with httpx.stream("POST", url, json=body, timeout=DEADLINE_S) as response:
            lines = response.iter_lines()
            next(lines)
            server.should_exit = True
            *_, last = (line for line in lines if line)
        thread.join(DEADLINE_S)
        release.set()
    assert not thread.is_alive()
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_draining_server_finishes_running_work_and_rejects_new_work(
    model: Any,
    model_tokenizer: ModelTokenizer,
    until: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = new_registry()
    limits = EngineLimits(max_model_len=256)
    engine = Engine(model, model_tokenizer, limits=limits, metrics=EngineMetrics(registry, "tiny"))
    forward, release = model.forward, threading.Event()

    def blocking(*args: Any, **kwargs: Any) -> Any:
        release.wait(DEADLINE_S)
        return forward(*args, **kwargs)

    app = create_app(engine, model_name="tiny", registry=registry)
    server = Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=DEADLINE_S)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 20}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        until(lambda: httpx.get(f"{url}/health", timeout=DEADLINE_S).status_code == 200)
        monkeypatch.setattr(model, "forward", blocking)  # the start computes batches too
        with ThreadPoolExecutor(1) as client:
            running = client.submit(
                httpx.post, f"{url}/v1/completions", json=body, timeout=DEADLINE_S
            )
            until(lambda: engine.is_busy or running.done())
            assert not running.done(), running.result().text
            server.should_exit = True
            until(lambda: httpx.get(f"{url}/health", timeout=60).status_code != 200)
            assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 200
            health = httpx.get(f"{url}/health", timeout=60)
            rejected = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            for response in (health, rejected):
                assert response.status_code == 503
                assert response.headers["Retry-After"] == "1"
                assert response.headers["Connection"] == "close"
                assert response.json()["error"]["code"] == "service_unavailable"
            release.set()
            assert running.result().status_code == 200
            assert running.result().json()["usage"]["completion_tokens"] == 20
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_but_not_the_process(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_UNTIL_SIGNAL], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert process.stdout.readline() == "listens\n"
        process.send_signal(number)
        assert process.stdout.read() == "after\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"FAASMOE_STORE": ""}, "FAASMOE_STORE: not set", id="no-store"),
        pytest.param({"FAASMOE_PORT": "x"}, "FAASMOE_PORT: got 'x'", id="port"),
        pytest.param({"FAASMOE_PARENT_PID": "x"}, "FAASMOE_PARENT_PID: got 'x'", id="parent"),
    ],
)
def test_invalid_setting_exits_with_one_line_on_stderr(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    settings = {"FAASMOE_STORE": str(tmp_path), "FAASMOE_TABLE": str(tmp_path / "table.json")}
    result = subprocess.run(
        [sys.executable, "-m", "faasmoe_router"],
        env={**os.environ, **settings, **change},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"faasmoe_router: {message}")
    assert len(result.stderr.splitlines()) == 1
