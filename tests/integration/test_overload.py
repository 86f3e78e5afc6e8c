"""Overload with ten times the capacity: excess requests are rejected, others are not slowed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import psutil
import pytest
from faasmoe_up import FaasmoeUp, running_up
from tiny_chat import MAX_MODEL_LEN, save_tiny_chat_model

N_SEQS = 8
MAX_WAITING = 0  # accepted requests run immediately
N_TOKENS = 96
BASELINE_S = 8.0
FACTOR = 10
MAX_CONNECTIONS = 512  # fewer than the gateway keeps of one address
MAX_GROWTH_BYTES = 64 << 20
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: tiny}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: 2}}
  router: {{maxModelLen: {length}, maxNumSeqs: {seqs}, maxWaiting: {waiting}, device: cpu}}
  experts: {{device: cpu, functionsPerSandbox: 4, scaling: {{minScale: 1, maxScale: 1}}}}
"""


@dataclass
class ClientResults:
    """Latencies and statuses that clients observed."""

    accepted_s: list[float] = field(default_factory=list)
    rejected_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    sending_s: float = 0.0

    def percentile_s(self, percent: float) -> float:
        ordered = sorted(self.accepted_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("overload")
    file = folder / "tiny.yaml"
    file.write_text(
        MOEMODEL.format(
            model=save_tiny_chat_model(folder / "model"),
            store=folder / "store",
            length=MAX_MODEL_LEN,
            seqs=N_SEQS,
            waiting=MAX_WAITING,
        )
    )
    with running_up(file, file.with_suffix(".log")) as up:
        yield up


class Clients:
    """Clients of a router."""

    def __init__(self, http: aiohttp.ClientSession, up: FaasmoeUp) -> None:
        self._http = http
        self._url = f"{up.base_url}/v1/completions"
        self._n = 0

    async def request(self, outcome: ClientResults) -> None:
        """Send one request; check the format of the response if it is rejected."""
        self._n += 1
        body = {
            "model": "tiny",
            "prompt": f"the quick fox {self._n}",
            "max_tokens": N_TOKENS,
            "temperature": 0,
        }
        started_s = time.monotonic()
        async with self._http.post(self._url, json=body) as response:
            value = await response.json()
            took_s = time.monotonic() - started_s
            outcome.statuses[response.status] += 1
            if response.status == 200:
                outcome.accepted_s.append(took_s)
                if value["usage"]["completion_tokens"] != N_TOKENS:
                    outcome.errors.append(str(value))
                return
            outcome.rejected_s.append(took_s)
            error = value.get("error", {})
            is_valid = (
                response.status in (429, 503)
                and int(response.headers.get("Retry-After", 0)) >= 1
                and error.keys() == {"message", "type", "param", "code"}
            )
            if not is_valid:
                outcome.errors.append(f"{response.status} {dict(response.headers)} {value}")

    async def run_at_capacity(self, for_s: float) -> ClientResults:
        """Keep N_SEQS requests outstanding."""
        outcome, end_s = ClientResults(), time.monotonic() + for_s

        async def request_repeatedly() -> None:
            while time.monotonic() < end_s:
                await self.request(outcome)

        await asyncio.gather(*(request_repeatedly() for _ in range(N_SEQS)))
        return outcome

    async def run_at_rate(self, per_s: float, n_requests: int) -> ClientResults:
        """Send requests at a fixed rate (open loop), or as fast as a busy machine can."""
        outcome, started_s = ClientResults(), time.monotonic()
        tasks: set[asyncio.Task[None]] = set()
        n_started = 0
        while n_started < n_requests:
            n_due = math.ceil((time.monotonic() - started_s) * per_s)
            while n_started < min(n_due, n_requests):
                n_started += 1
                task = asyncio.create_task(self.request(outcome))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.005)
        outcome.sending_s = time.monotonic() - started_s
        await asyncio.gather(*tasks)
        return outcome


async def run_overload(up: FaasmoeUp, for_s: float) -> dict[str, float]:
    """Overload the router, check statuses and memory, and return all figures."""
    router = up.router
    assert router is not None
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        clients = Clients(http, up)
        await clients.run_at_capacity(2.0)
        before = await clients.run_at_capacity(BASELINE_S)
        memory = _memory(router)
        per_s = FACTOR * len(before.accepted_s) / BASELINE_S
        during = await clients.run_at_rate(per_s, round(per_s * for_s))
        peak = _memory(router)
        after = await clients.run_at_capacity(BASELINE_S)
    assert before.statuses.keys() == after.statuses.keys() == {200}
    assert during.errors == before.errors == after.errors == []
    assert during.statuses.total() >= 0.8 * per_s * for_s, "offered requests not reached"
    assert during.statuses[200] < during.statuses.total() / 2
    assert peak - memory <= MAX_GROWTH_BYTES
    assert up.router_metric("local_computations_total") == 0
    return {
        "capacity_per_s": len(before.accepted_s) / BASELINE_S,
        "offered_per_s": during.statuses.total() / during.sending_s,
        "offered_share": during.statuses.total() / (per_s * during.sending_s),
        "offered_per_accepted": during.statuses.total() / during.statuses[200],
        "accepted_per_s": during.statuses[200] / during.sending_s,
        "p50_before_s": before.percentile_s(50),
        "p50_after_s": after.percentile_s(50),
        "p99_before_s": before.percentile_s(99),
        "p99_during_s": during.percentile_s(99),
        "p50_during_s": during.percentile_s(50),
        "p99_after_s": after.percentile_s(99),
        "refusal_max_s": max(during.rejected_s),
        "memory_growth_bytes": peak - memory,
    }


def _memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def test_overload_is_rejected_without_memory_growth(up: FaasmoeUp) -> None:
    print(asyncio.run(run_overload(up, 10.0)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overload_does_not_slow_accepted_requests(up: FaasmoeUp) -> None:
    """Needs an otherwise idle machine, since it compares latencies."""
    figures = asyncio.run(run_overload(up, 60.0))
    print(figures)
    assert figures["offered_share"] >= 0.8, "offered rate not reached"
    assert figures["p99_during_s"] <= 2 * figures["p99_before_s"]
    assert figures["p50_after_s"] <= 1.5 * figures["p50_before_s"], "it did not recover"
