"""`python -m faasmoe_router` with a control process, from start to shutdown."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faasmoe_up import free_port
from fake_control import FakeControl

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import Store

DEADLINE_S = 120.0
TOKEN = "secret"


@pytest.fixture
def url(store: Store, control: FakeControl, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    settings = {
        "STORE": store.path,
        "CONTROL_URL": control.url,
        "TOKEN": TOKEN,
        "MODEL_NAME": "tiny",
        "PORT": port,
        "DEVICE": "cpu",
        "ACTIVATION_TIMEOUT": 0.5,
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name}": str(value) for name, value in settings.items()}
    env |= {PARENT_PID_ENV: str(os.getpid())}
    log = tmp_path / "router.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "faasmoe_router"], env=env, stdout=output, stderr=output
        )
    try:
        yield _ready(f"http://127.0.0.1:{port}", process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
        assert not re.search("Traceback|ERROR", log.read_text())
    finally:
        process.kill()
        process.wait()


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    end_s = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end_s, log.read_text()
        try:
            if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                return url
        except httpx.ConnectError:
            time.sleep(0.05)


def test_an_invalid_tokenizer_ends_the_process_with_one_line(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(store.path, folder)
    broken = folder / "model" / "tokenizer.json"
    broken.write_text('{"version": 1}'.ljust(broken.stat().st_size))
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {
        "FAASMOE_STORE": str(folder),
        "FAASMOE_CONTROL_URL": "http://127.0.0.1:1",
        "FAASMOE_DEVICE": "cpu",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "faasmoe_router"],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    expected = f"faasmoe_router: FAASMOE_STORE: {folder / 'model'}: no tokenizer can be loaded: "
    assert ended.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in ended.stderr


def test_rejects_requests_at_zero_and_serves_activated_functions(
    url: str, control: FakeControl, warm: dict[str, list[str]]
) -> None:
    body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4}
    refused = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S)
    assert refused.status_code == 503
    assert control.activation_requests[0] == list(warm)
    control.on_activation = lambda names: control.set_addresses(
        {name: warm[name] for name in names}
    )
    served = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S)
    assert served.status_code == 200
    assert "X-FaaSMoE-Cold-Start" in served.headers
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    for name in (
        "queued_requests",
        "queued_calls",
        "activation_requests_total",
        "cold_start_seconds_bucket",
        "control_connected",
        "routing_table_version",
        "local_computations_total",
    ):
        assert f"faasmoe_router_{name}" in metrics
