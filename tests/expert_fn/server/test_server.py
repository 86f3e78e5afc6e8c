"""The sandbox process: startup, shutdown, failures and leaks."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from raw_http import (
    DEADLINE_S,
    n_connections,
    post_request,
    read_response,
    request_frame,
    wait_until,
)
from sandbox_processes import SandboxProcess, StartSandbox, make_function_spec, sandbox_env

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, manifest_digest

INVALID_SETTINGS = 2  # exit status


def connect(sandbox_server: SandboxProcess) -> socket.socket:
    host, port = sandbox_server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def terminate(sandbox_server: SandboxProcess) -> int:
    sandbox_server.process.send_signal(signal.SIGTERM)
    return sandbox_server.process.wait(DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exits_cleanly_on_a_signal(sandbox: StartSandbox, store: Store, number: int) -> None:
    with (
        sandbox(capacity=9) as sandbox_server,
        connect(sandbox_server) as idle,
        connect(sandbox_server) as partial,
    ):
        sandbox_server.attach_blocks(store, 99)
        partial.sendall(b"GET /hea")
        sandbox_server.process.send_signal(number)
        assert sandbox_server.process.wait(DEADLINE_S) == 0
        assert idle.recv(1) == b""
        assert "Traceback" not in sandbox_server.log.read_text()


def test_sends_pending_responses_before_exit(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> None:
    with sandbox(capacity=9) as sandbox_server, connect(sandbox_server) as client:
        sandbox_server.attach(store, spec)
        client.sendall(
            post_request(spec.id, request_frame(n_rows=50_000))
        )  # a response of 6 MB exceeds socket buffers
        wait_until(
            lambda: "faasmoe_expert_frames_total 1.0" in sandbox_server.http.get("/metrics").text
        )
        sandbox_server.process.send_signal(signal.SIGTERM)
        status, _, body = read_response(client)
        assert (status, len(body)) == (200, 32 + 50_000 * 32 * 4)
        assert sandbox_server.process.wait(DEADLINE_S) == 0


def test_client_that_does_not_read_does_not_delay_exit(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> None:
    with sandbox() as sandbox_server, connect(sandbox_server) as client:
        sandbox_server.attach(store, spec)
        client.sendall(post_request(spec.id, request_frame(n_rows=50_000)))
        wait_until(
            lambda: "faasmoe_expert_frames_total 1.0" in sandbox_server.http.get("/metrics").text
        )
        assert terminate(sandbox_server) == 0


def test_failed_computation_returns_500_and_the_sandbox_keeps_serving(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, tmp_path: Path
) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    manifest["layers"][0]["kernel"]["transposed"] = True  # incompatible shapes
    manifest["digest"] = manifest_digest(manifest)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    with sandbox(capacity=2) as sandbox_server:
        sandbox_server.attach(Store.open(tmp_path / "store"), spec)
        for _ in range(2):
            response = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=request_frame())
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "internal"
        assert "RuntimeError" in sandbox_server.log.read_text()
        good = make_function_spec(store, [1], [1])
        sandbox_server.attach(store, good)
        frame = request_frame(layer=1)
        assert (
            sandbox_server.http.post(f"/v1/functions/{good.id}", content=frame).status_code == 200
        )
        assert terminate(sandbox_server) == 0


def run_sandbox(**variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "faasmoe_expert"],
        env=sandbox_env(**variables) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_missing_device_fails_at_startup(device: str) -> None:
    result = run_sandbox(device=device, port=0)
    assert result.returncode == INVALID_SETTINGS
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"faasmoe_expert: FAASMOE_DEVICE: got '{device}', expected cpu or auto: torch "
    )


def test_invalid_setting_fails_at_startup() -> None:
    result = run_sandbox(capacity="many")
    assert result.returncode == INVALID_SETTINGS
    expected = "faasmoe_expert: FAASMOE_CAPACITY: got 'many', expected an integer"
    assert result.stderr.strip() == expected


def test_port_in_use_fails_at_startup() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = run_sandbox(port=listener.getsockname()[1], device="cpu")
    assert result.returncode == INVALID_SETTINGS
    assert "Traceback" not in result.stderr
    assert "address already in use" in result.stderr


def test_dies_with_its_parent(store: Store, tmp_path: Path) -> None:
    """Even if the parent is killed; here it is a script that starts a sandbox."""
    script = (
        "import os, subprocess, sys, time\n"
        "os.environ['FAASMOE_PARENT_PID'] = str(os.getpid())\n"
        "child = subprocess.Popen([sys.executable, '-m', 'faasmoe_expert'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    log = (tmp_path / "log").open("w+b")
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env=sandbox_env(port=0, device="cpu"),
        stdout=subprocess.PIPE,
        stderr=log,
    )
    with parent, log:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: b"listening on" in (tmp_path / "log").read_bytes())
        parent.kill()
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_does_not_leak_memory_or_descriptors(sandbox: StartSandbox, store: Store) -> None:
    with sandbox(capacity=2) as sandbox_server:
        process = psutil.Process(sandbox_server.process.pid)
        send_work(sandbox_server, store, 60)
        before = process.memory_full_info().uss, process.num_fds()
        send_work(sandbox_server, store, 400)
        after = process.memory_full_info().uss, process.num_fds()
        assert after[0] - before[0] < 3 << 20
        assert after[1] <= before[1]


def send_work(sandbox_server: SandboxProcess, store: Store, n_rounds: int) -> None:
    """Attach, compute, send invalid requests, lose connections and detach."""
    before = n_connections(sandbox_server)
    for n in range(n_rounds):
        spec = make_function_spec(store, [0], [n % 7, 7])
        sandbox_server.attach(store, spec)
        path = f"/v1/functions/{spec.id}"
        frame = request_frame(n_rows=1 + n % 300, expert=7)
        assert sandbox_server.http.post(path, content=frame).status_code == 200
        assert sandbox_server.http.post(path, content=frame[:-1]).status_code == 400
        assert sandbox_server.http.put(path, content=b"{").status_code == 422
        with connect(sandbox_server) as lost_client:
            lost_client.sendall(post_request(spec.id, frame)[: 1 + n * 7])
        assert sandbox_server.http.delete(path).status_code == 204
    wait_until(lambda: n_connections(sandbox_server) <= before)
