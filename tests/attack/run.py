"""One attack: starts the stack, measures it calm, attacks it, and returns the figures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import moemodel_files
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tests.attack.clients import (
    REQUEST_TIMEOUT_S,
    AttackFailed,
    Probe,
    QuietStreams,
    QuietTenants,
    completion_request,
    connect,
    post_request,
)
from tiny_chat import EXPERTS, save_tiny_chat_model

TENANTS = ("flood", "quiet", "calm")
N_HANG_UP_CLIENTS = 60
N_IDLE_CONNECTIONS = 300
IDLE_DEADLINE_S = 40.0
BODIES_TIMEOUT_S = 60.0
N_ROUNDS = 3
N_RECOVERIES = 5
N_STREAM_KILLS = 3
N_STREAMS = 6

BOUNDS: dict[str, Callable[[float], bool]] = {
    "quiet_p99_ratio": lambda value: value <= 1.5,
    "loop_stall_max_ms": lambda value: value <= 50,
    "rss_growth_mb": lambda value: value <= 64,
    "idle_closed": lambda value: value == 1.0,
    "failed_quiet": lambda value: value == 0,
    "router_kill_recovery_s": lambda value: value <= 5,
    "streams_cut": lambda value: value == 0,
    "texts_changed": lambda value: value == 0,
}


def attack(folder: Path, *, seed: int, seconds: float) -> dict[str, float]:
    """Attack a stack in a new folder; return the figures."""
    with running_up(write_moemodel(folder), folder / "up.log") as up:
        figures = asyncio.run(_hang_ups(up, seed=seed, seconds=seconds))
        figures |= _bodies(up)
        figures |= _idle_connections(up)
        figures |= _router_kills(up)
    return figures


def write_moemodel(folder: Path) -> Path:
    """Write a model, keys and a MoEModel file; return the file."""
    model = save_tiny_chat_model(folder / "model")
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(folder / "store")},
        "granularity": {"expertsPerFunction": EXPERTS // 2, "layersPerFunction": 1},
        "router": {"device": "cpu", "maxNumSeqs": 8},
        "experts": {"device": "cpu", "functionsPerSandbox": 8},
        "tenants": moemodel_files.write_tenants(folder, TENANTS),
    }
    return moemodel_files.write_moemodel(folder / "model.yaml", spec)


async def _hang_ups(up: FaasmoeUp, *, seed: int, seconds: float) -> dict[str, float]:
    await QuietTenants(up.base_url).run(2.0)  # warms up
    calm, stormy = QuietTenants(up.base_url), QuietTenants(up.base_url)
    n_hang_ups = 0
    for number in range(N_ROUNDS):  # in turns, as the machine's own noise changes
        await calm.run(seconds / N_ROUNDS)
        storm = await _start_storm(up.base_url, seconds=seconds / N_ROUNDS, seed=seed + number)
        n, _ = await asyncio.gather(_run_storm(storm), stormy.run(seconds / N_ROUNDS))
        n_hang_ups += n
        await asyncio.to_thread(_wait_until_idle, up)
    calm_p99_s, stormy_p99_s = (percentile_99(t.latencies_s) for t in (calm, stormy))
    return {
        "hang_ups": n_hang_ups,
        "quiet_requests": len(stormy.latencies_s),
        "quiet_p50_calm_ms": round(1000 * statistics.median(calm.latencies_s), 1),
        "quiet_p50_storm_ms": round(1000 * statistics.median(stormy.latencies_s), 1),
        "quiet_p99_calm_ms": round(1000 * calm_p99_s, 1),
        "quiet_p99_storm_ms": round(1000 * stormy_p99_s, 1),
        "quiet_p99_ratio": round(stormy_p99_s / calm_p99_s, 2),
        "failed_quiet": calm.n_failed + stormy.n_failed,
    }


def _wait_until_idle(up: FaasmoeUp) -> None:
    """Wait until nothing of a storm is left."""

    def is_idle() -> bool:
        load = httpx.get(f"{up.base_url}/load", timeout=REQUEST_TIMEOUT_S)
        return not load.json()["server_load"]

    wait_until(is_idle, timeout_s=REQUEST_TIMEOUT_S, what="an idle router")


async def _start_storm(url: str, *, seconds: float, seed: int) -> asyncio.subprocess.Process:
    """Return the clients of a storm, ready to begin; they yield the cores."""
    arguments = {"url": url, "seconds": seconds, "n_clients": N_HANG_UP_CLIENTS, "seed": seed}
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", "19", sys.executable, "-m", "tests.attack.storm", json.dumps(arguments)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    yield_cores(process.pid)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def _run_storm(process: asyncio.subprocess.Process) -> int:
    """Let a storm begin; return how often clients hung up."""
    output, _ = await process.communicate(b"\n")
    return int(output)


def yield_cores(pid: int) -> None:
    """Let all other sessions' processes go before those of this session's leader.

    Linux groups processes by session and divides the cores between the groups, so that niceness
    counts only within one. Without such groups there is nothing to do.
    """
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/{pid}/autogroup").write_text("19")


def percentile_99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def _bodies(up: FaasmoeUp) -> dict[str, float]:
    """Send the bodies that once blocked the event loop, and heads without end."""
    before_bytes = peak_bytes = _front_bytes(up)
    probe = Probe(up.base_url)
    contents = hostile_requests()  # made before: the probe shares this interpreter
    n_rounds = 0
    with probe.running():
        # A front that refuses all at once is done with a round before a slow machine has probed it.
        for _ in probe.rounds(timeout_s=BODIES_TIMEOUT_S):
            n_rounds += 1
            for content in contents:
                with connect(up.base_url) as connection, contextlib.suppress(OSError):
                    connection.sendall(content)
                    while connection.recv(1 << 16):
                        pass
                peak_bytes = max(peak_bytes, _front_bytes(up))
    return {
        "body_rounds": n_rounds,
        "probe_answers": probe.n_answers,
        "loop_stall_max_ms": round(1000 * probe.max_s, 1),
        "rss_growth_mb": round((peak_bytes - before_bytes) / 1e6, 1),
    }


def _front_bytes(up: FaasmoeUp) -> int:
    """Return the memory of gateway and router together."""
    processes = (up.child_running("faasmoe_gateway"), up.router)
    return sum(process.memory_info().rss for process in processes if process is not None)


def hostile_requests() -> list[bytes]:
    """Return requests whose bodies or heads are as large and as dense as may be."""
    chat = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],'
    bodies = [
        ("/v1/chat/completions", b'{"model":"tiny","messages":[' + b"{}," * 240_000 + b"{}]}"),
        ("/v1/chat/completions", b'{"model":"tiny","messages":[' + b"{}," * 30_000 + b"{}]}"),
        ("/v1/chat/completions", chat + b'"x":[' + b"[]," * 2_000_000 + b"[]]}"),
        ("/v1/chat/completions", chat + b'"x":[' + b"[]," * 30_000 + b"[]]}"),
        ("/v1/chat/completions", chat + b'"x":"' + b"x" * 200_000 + b'"}'),
        ("/v1/completions", b'{"model":"tiny","prompt":[' + b"1," * 4_000_000 + b"1]}"),
        ("/v1/completions", b'{"model":"tiny","prompt":[' + b"1," * 150_000 + b"1]}"),
        ("/v1/detokenize", b'{"tokens":[' + b"1," * 4_000_000 + b"1]}"),
        ("/v1/detokenize", b'{"tokens":[' + b"1," * 65_000 + b"1]}"),
        ("/v1/tokenize", b'{"prompt":"' + b"a " * 120_000 + b'"}'),
        (
            "/v1/chat/completions",
            chat + b'"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(650_000)) + b"}}",
        ),
    ]
    close = b"Connection: close\r\n"
    requests = [post_request("flood-key", path, body) for path, body in bodies]
    requests = [content.replace(b"Host: a\r\n", b"Host: a\r\n" + close, 1) for content in requests]
    return [
        *requests * 2,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: " + b"a" * 60_000_000,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 5_000_000,
    ]


def _idle_connections(up: FaasmoeUp) -> dict[str, float]:
    """Open connections that say nothing, or never all; count those that are closed in time."""
    starts = (b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
    connections = [connect(up.base_url) for _ in range(N_IDLE_CONNECTIONS)]
    for number, connection in enumerate(connections):
        connection.sendall(starts[number % len(starts)])
    end_s = time.monotonic() + IDLE_DEADLINE_S
    n_closed = 0
    for connection in connections:
        connection.settimeout(max(0.01, end_s - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            while connection.recv(4096):
                pass
            n_closed += 1
        connection.close()
    return {"idle_closed": n_closed / len(connections)}


def _router_kills(up: FaasmoeUp) -> dict[str, float]:
    """Kill the router and measure a request sent right after, several times."""
    recoveries_s = []
    for _ in range(N_RECOVERIES):
        _kill_router(up)
        start_s = time.monotonic()
        content = completion_request("quiet-key", "the quick", max_tokens=2)
        with connect(up.base_url) as connection:
            connection.settimeout(REQUEST_TIMEOUT_S)
            connection.sendall(content)
            answer = connection.recv(4096)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise AttackFailed(f"after a router's kill: got {answer[:200]!r}, expected status 200")
        recoveries_s.append(time.monotonic() - start_s)
        health = httpx.get(f"{up.base_url}/health", timeout=REQUEST_TIMEOUT_S)
        if health.status_code != 200:
            raise AttackFailed(f"/health after a router's kill: got {health.status_code}")
    return {
        "router_kill_recovery_s": round(statistics.median(recoveries_s), 2),
        **asyncio.run(_streams_of_killed_routers(up)),
    }


async def _streams_of_killed_routers(up: FaasmoeUp) -> dict[str, float]:
    """Kill the router while streams run, several times; compare their texts with undisturbed."""
    calm = QuietStreams(up.base_url, N_STREAMS)
    await calm.run()
    n_cut, n_changed = calm.n_cut, 0
    for _ in range(N_STREAM_KILLS):
        disturbed = QuietStreams(up.base_url, N_STREAMS)
        await disturbed.run(lambda: _kill_router(up))
        n_cut += disturbed.n_cut
        n_changed += sum(disturbed.texts[n] != text for n, text in calm.texts.items())
    return {"streams": N_STREAMS * N_STREAM_KILLS, "streams_cut": n_cut, "texts_changed": n_changed}


def _kill_router(up: FaasmoeUp) -> None:
    router = up.router
    assert router is not None
    router.send_signal(signal.SIGKILL)
