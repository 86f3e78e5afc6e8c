"""Soak test: memory, descriptors, threads and tasks stay bounded over many scaling cycles.

Run with `make soak`; FAASMOE_SOAK_MINUTES sets its duration (default 20).
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tiny_chat import MAX_MODEL_LEN, save_tiny_chat_model

from faasmoe_operator.platforms.memory import pss_bytes

MINUTES = float(os.environ.get("FAASMOE_SOAK_MINUTES", "20"))
BUSY_S = 8.0
N_CLIENTS = 8
N_TOKENS = 24
WINDOW_S = 6  # Knative's minimum
OUT = Path(__file__).parents[2] / "benchmarks" / "out" / "soak.json"
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: tiny}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: 2}}
  router: {{maxModelLen: {length}, maxNumSeqs: 8, device: cpu}}
  experts:
    device: cpu
    functionsPerSandbox: 2
    warmPool: 1
    scaling: {{windowSeconds: {window}, panicWindowPercentage: 20,
      scaleToZeroGracePeriodSeconds: 0}}
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources of the long-lived processes when idle.

    Attributes:
        router_bytes: memory of the router.
        control_bytes: memory of the control process.
        zygote_bytes: memory of the zygote.
        descriptors: open file descriptors of all three.
        threads: threads of all three.
        tasks: asyncio tasks of router and control process.
        sandboxes: sandbox processes.
    """

    router_bytes: int
    control_bytes: int
    zygote_bytes: int
    descriptors: int
    threads: int
    tasks: int
    sandboxes: int


MAX_GROWTH = Sample(
    router_bytes=24 << 20,
    control_bytes=8 << 20,
    zygote_bytes=4 << 20,
    descriptors=16,
    threads=4,
    tasks=8,
    sandboxes=1,
)
"""Maximum growth from the first samples after a warm-up to the last ones."""


@pytest.fixture
def up(tmp_path: Path) -> Iterator[FaasmoeUp]:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        MOEMODEL.format(
            model=save_tiny_chat_model(tmp_path / "model"),
            store=tmp_path / "store",
            length=MAX_MODEL_LEN,
            window=WINDOW_S,
        )
    )
    with running_up(file, file.with_suffix(".log")) as up:
        yield up


def run_traffic(up: FaasmoeUp, for_s: float) -> int:
    """Send requests from several clients; return the number of responses."""
    end_s = time.monotonic() + for_s

    def ask(n: int) -> int:
        n_responses = 0
        with httpx.Client(base_url=up.base_url, timeout=60, trust_env=False) as client:
            while time.monotonic() < end_s:
                body = {"model": "tiny", "prompt": f"fox {n}", "max_tokens": N_TOKENS}
                response = client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                n_responses += 1
        return n_responses

    with ThreadPoolExecutor(N_CLIENTS) as clients:
        return sum(clients.map(ask, range(N_CLIENTS)))


def take_sample(up: FaasmoeUp) -> Sample:
    names = ("faasmoe_operator.control", "faasmoe_expert.zygote")
    processes = [up.router, *(up.child_running(name) for name in names)]
    running = [process for process in processes if process is not None]
    assert len(running) == len(processes)
    router_bytes, control_bytes, zygote_bytes = (pss_bytes(p.pid) or 0 for p in running)
    return Sample(
        router_bytes=router_bytes,
        control_bytes=control_bytes,
        zygote_bytes=zygote_bytes,
        descriptors=sum(process.num_fds() for process in running),
        threads=sum(process.num_threads() for process in running),
        tasks=int(up.router_metric("event_loop_tasks") + up.control_metric("event_loop_tasks")),
        sandboxes=len(up.sandboxes),
    )


def is_at_zero(up: FaasmoeUp) -> bool:
    return all(function["ready"] == 0 for function in up.status()["functions"])


def median(samples: Sequence[Sample], name: str) -> float:
    values = sorted(getattr(sample, name) for sample in samples)
    return float(values[len(values) // 2])


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_resources_stay_bounded_over_scaling_cycles(up: FaasmoeUp) -> None:
    samples: list[Sample] = []
    n_responses, end_s = 0, time.monotonic() + MINUTES * 60
    while time.monotonic() < end_s or len(samples) < 8:
        n_responses += run_traffic(up, BUSY_S)
        wait_until(lambda: is_at_zero(up), timeout_s=60, what="zero")
        gc.collect()
        samples.append(take_sample(up))
    quarter = max(2, len(samples) // 4)
    first, last = samples[quarter : 2 * quarter], samples[-quarter:]
    growth = {name: median(last, name) - median(first, name) for name in asdict(MAX_GROWTH)}
    figures = {
        "minutes": MINUTES,
        "answers": n_responses,
        "cycles": len(samples),
        "growth": growth,
        "bounds": asdict(MAX_GROWTH),
        "first": asdict(samples[0]),
        "last": asdict(samples[-1]),
        "load_1min": psutil.getloadavg()[0],
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    over = {name: grown for name, grown in growth.items() if grown > getattr(MAX_GROWTH, name)}
    assert not over, figures
