"""`python -m benchmarks.gateway`: what the gateway of `faasmoe up` costs, on a tiny model.

Compares the same requests with and without it: the latency of a short completion, and the time and
CPU time of streams. Then a tenant's limit over four routers (`gateway_limits.py`). Writes
benchmarks/out/gateway.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from benchmarks.gateway_limits import measure_limits  # noqa: E402
from faasmoe_up import FaasmoeUp, running_up  # noqa: E402
from tests.attack.run import write_moemodel  # noqa: E402

N_SHORT = 300
N_STREAMS = 8
N_TOKENS = 200
N_ROUNDS = 5
HEADERS = {"Authorization": "Bearer quiet-key"}
SHORT = {"model": "tiny", "prompt": "the quick", "max_tokens": 1, "temperature": 0}
LONG = {**SHORT, "max_tokens": N_TOKENS, "stream": True}


def main() -> int:
    """Measure with and without a gateway, in turns; print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "gateway.json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gateway-") as name:
        folder = Path(name)
        file = write_moemodel(folder)
        for option in ("--no-gateway", "--gateway"):
            with running_up(file, folder / "up.log", option) as up:
                figures[option.removeprefix("--")] = asyncio.run(measure(up))
    without, with_it = figures["no-gateway"], figures["gateway"]
    figures["added_p50_ms"] = round(with_it["short_ms_p50"] - without["short_ms_p50"], 3)
    figures["chunk_cpu_us"] = with_it["gateway_us_per_chunk"]
    figures["stream_time_ratio"] = round(with_it["stream_s"] / without["stream_s"], 3)
    figures |= asyncio.run(measure_limits())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


async def measure(up: FaasmoeUp) -> dict[str, float]:
    """Return latencies, and the CPU time of each process per streamed chunk."""
    async with httpx.AsyncClient(headers=HEADERS, timeout=60) as client:
        url = f"{up.base_url}/v1/completions"
        await time_short(client, url, n=50)
        short_s = await time_short(client, url, n=N_SHORT)
        before = cpu_seconds(up)
        rounds_s, n_chunks = [], 0
        for _ in range(N_ROUNDS):
            start_s = time.monotonic()
            counts = await asyncio.gather(*(read_stream(client, url) for _ in range(N_STREAMS)))
            rounds_s.append(time.monotonic() - start_s)
            n_chunks += sum(counts)
    used = {name: after - before[name] for name, after in cpu_seconds(up).items()}
    gateway = up.child_running("faasmoe_gateway")
    return {
        "short_ms_p50": round(1000 * statistics.median(short_s), 3),
        "short_ms_p95": round(1000 * statistics.quantiles(short_s, n=20)[-1], 3),
        "stream_s": round(statistics.median(rounds_s), 3),
        "chunks": n_chunks,
        **{f"{name}_us_per_chunk": round(1e6 * s / n_chunks, 1) for name, s in used.items()},
        "gateway_mb": 0.0 if gateway is None else round(gateway.memory_info().rss / 1e6, 1),
    }


async def time_short(client: httpx.AsyncClient, url: str, *, n: int) -> list[float]:
    """Return the latencies of short completions, one after the other."""
    latencies_s = []
    for _ in range(n):
        start_s = time.monotonic()
        (await client.post(url, json=SHORT)).raise_for_status()
        latencies_s.append(time.monotonic() - start_s)
    return latencies_s


async def read_stream(client: httpx.AsyncClient, url: str) -> int:
    """Return how many events a stream has."""
    n_events = 0
    async with client.stream("POST", url, json=LONG) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            n_events += line.startswith("data: {")
    return n_events


def cpu_seconds(up: FaasmoeUp) -> dict[str, float]:
    """Return the CPU time that router and gateway have used."""
    used = {}
    processes = {"router": up.router, "gateway": up.child_running("faasmoe_gateway")}
    for name, process in processes.items():
        if process is not None:
            times = process.cpu_times()
            used[name] = times.user + times.system
    return used


if __name__ == "__main__":
    sys.exit(main())
