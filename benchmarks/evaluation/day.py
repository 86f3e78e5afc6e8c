"""`faasmoe bench day`: memory over a bursty day, with everything at zero between the bursts.

The same compressed day for `faasmoe up` with a quantised store whose functions and router end while
nobody uses them, for one resident full model, and for llama.cpp's resident server. What counts is
GB-seconds per generated token; the goals are ratios of these.

Whoever runs a real day would let functions end after some idle minutes, so the day is long enough
for the shortest windows that can be configured to be that: `window_minutes` has both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from benchmarks.evaluation.client import TenantEndpoint, WorkloadResult, run_workload
from benchmarks.evaluation.full_model_tuning import DEFAULT_SETTINGS
from benchmarks.evaluation.meter import ProcessTree, ResourceUsage, metering
from benchmarks.evaluation.models import MODEL_NAME, BenchmarkModel, prepare_store, quantized
from benchmarks.evaluation.options import CACHE, DEFAULT_OUT, QUICK_SIZES
from benchmarks.evaluation.paper import warm_up_workload
from benchmarks.evaluation.strategies import StrategySettings, full_model_shared
from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.evaluation.workload import TENANTS, Workload, day_workload
from benchmarks.peers.environments import make_llama_environment
from benchmarks.peers.gguf_files import QUANTIZATIONS
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.models import DEMO_CHECKPOINT, checkpoint_folder, function_counts
from benchmarks.peers.workload import CONTEXT_TOKENS
from benchmarks.report import describe_machine, percentile, write_figures
from benchmarks.server_process import free_port, terminate
from benchmarks.up_process import wait_serving
from benchmarks.worker import ROOT

from faasmoe_contracts.store import Store
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.cli.signals import run_until_signal

OURS, RESIDENT, LLAMA = "zero", "resident", "llama.cpp"
TITLES = {
    OURS: "functions and router to zero (ours)",
    RESIDENT: "one resident full model",
    LLAMA: "llama.cpp's server, resident",
}
MODELS = {"demo": DEMO_CHECKPOINT, "qwen": "qwen", "tiny": "tiny"}
PROMPT_CHARACTERS = {"demo": 1000, "qwen": 160, "tiny": 24}  # qwen's tokenizer is byte-level
SLOTS = 8
IDLE_SECONDS = 10  # the shortest that a router waits
DURATION_S = 600.0
DAY_MINUTES = 24 * 60
AT_REST_FACTOR = 1.1  # of the least memory
FUNCTIONS_PER_LAYER, SANDBOXES = 3, 3
ZERO_TIMEOUT_S = 180.0
POLL_S = 0.1
ZYGOTES = ("faasmoe_router.zygote", "faasmoe_expert.zygote")
FUNCTION_WINDOW_SECONDS = 6  # Knative's shortest
EXPERTS: Mapping[str, Any] = {
    "warmPool": 0,
    "scaling": {
        "windowSeconds": FUNCTION_WINDOW_SECONDS,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    },
}


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running server.

    Attributes:
        url: base URL of its OpenAI API.
        roots: process ids whose trees it consists of.
    """

    url: str
    roots: tuple[int, ...]


Deploy = Callable[[], AbstractAsyncContextManager[Deployed]]


@dataclass(frozen=True, slots=True)
class DayRun:
    """One day of one server."""

    result: WorkloadResult
    usage: ResourceUsage

    def figures(self) -> dict[str, Any]:
        """Return the figures of the day."""
        served = [r for r in self.result.results if not r.error]
        tokens = sum(r.n_tokens for r in served)
        gb_s = self.usage.byte_s / 1e9
        ttfts = [r.ttft_s for r in served]
        samples = [sample.total / 1e9 for sample in self.usage.samples]
        gaps = [b.at_s - a.at_s for a, b in pairwise(self.usage.samples)]
        return {
            "gb_s": gb_s,
            "gb_s_per_token": gb_s / tokens if tokens else None,
            "mean_gb": gb_s / self.usage.time_s,
            "min_gb": min(samples),
            "max_gb": max(samples),
            "at_rest": self._time_below(AT_REST_FACTOR * min(samples)) / self.usage.time_s,
            "sampling_s": self.usage.sampling_s,
            "longest_gap_s": max(gaps),
            "ttft_p50_s": percentile(ttfts, 50) if ttfts else None,
            "ttft_p99_s": percentile(ttfts, 99) if ttfts else None,
            "cpu_s": self.usage.cpu_s,
            "tokens": tokens,
            "requests": len(self.result.results),
            "failed": len(self.result.results) - len(served),
            "errors": sorted({r.error for r in self.result.results if r.error})[:5],
            "time_s": self.usage.time_s,
            "memory": [[s.at_s, s.total / 1e9] for s in self.usage.samples],
        }

    def _time_below(self, gb: float) -> float:
        """Return the seconds between samples that are both at most `gb`."""
        return sum(
            b.at_s - a.at_s
            for a, b in pairwise(self.usage.samples)
            if max(a.total, b.total) / 1e9 <= gb
        )


def add_command(commands: Any) -> None:
    """Add `faasmoe bench day`."""
    parser = commands.add_parser(
        "day",
        help="GB-seconds of a bursty day, beside resident servers",
        description="Send a compressed day of bursts to functions and a router that go to zero,\n"
        "to one resident full model and to llama.cpp's server; compare GB-seconds per token.",
        epilog="Examples:\n"
        "  faasmoe bench day --model qwen --quantization int4     35 minutes\n"
        "  faasmoe bench day --duration 165     10 minutes, in which functions wait for nearly an\n"
        "                                       hour of the day until they end",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        choices=tuple(MODELS),
        default="demo",
        help="the demo model, random weights of Qwen1.5-MoE's geometry with 4 layers, or tiny "
        "ones (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=tuple(QUANTIZATIONS),
        default="int8",
        help="of our store; llama.cpp's file is Q8_0 or Q4_0 (default: %(default)s)",
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=DURATION_S,
        metavar="S",
        help="length of the compressed day, for each server (default: %(default)s, in which "
        "functions end after 14 minutes of the day without requests, and the router after 24)",
    )
    parser.add_argument(
        "--requests", type=int, default=60, help="requests of the day (default: %(default)s)"
    )
    parser.add_argument(
        "--tenants", type=int, default=TENANTS, help="number of tenants (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="days of each (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the day (default: 0)")
    parser.add_argument(
        "--without-llama", action="store_true", help="leave out llama.cpp, which pip installs"
    )
    parser.add_argument("--quick", action="store_true", help="tiny model, 6 requests, 36 s")
    parser.add_argument(
        "--cache", type=Path, default=CACHE / "peers", help="models (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of day.json (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the day of every server; write day.json."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if arguments.quick:
        arguments.model, arguments.requests, arguments.duration = "tiny", 6, 36.0
    return asyncio.run(run_until_signal(_run(arguments)))


async def _run(arguments: argparse.Namespace) -> int:
    machine = describe_machine()
    cache = arguments.cache.resolve()
    model = await make_model(arguments.model, cache, arguments.quantization)
    deploys = await make_deploys(arguments, model, cache)
    workload = day_workload(
        arguments.requests,
        arguments.duration,
        seed=arguments.seed,
        sizes=model.sizes,
        tenants=arguments.tenants,
    )
    warm_up = warm_up_workload(model, arguments.tenants)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in deploys}
    for _ in range(arguments.repeats):
        for name, deploy in deploys.items():
            found = (await measure(deploy, warm_up, workload, ends=name == OURS)).figures()
            runs[name].append(found)
            per_token = found["gb_s_per_token"]
            print(f"  {name}: {per_token} GB s per token, {found['failed']} failed", flush=True)
    figures = compare(runs)
    about = {
        "model": model.describe(),
        "workload": {
            "requests": len(workload.requests),
            "tokens": workload.n_tokens,
            "duration_s": workload.duration_s,
            "digest": workload.digest,
            "window_minutes": window_minutes(workload.duration_s),
        },
        "machine": machine,
    }
    out = arguments.out.resolve()
    print(f"\n{describe_day(about['workload'])}\n\n{format_day(figures)}")
    print(f"figures: {write_figures('day', figures | about, folder=out)}")
    (out / "day.md").write_text(markdown(figures, about), encoding="utf-8")
    return 0


def window_minutes(duration_s: float) -> dict[str, float]:
    """Return how many minutes of the compressed day functions and router are kept without use."""
    minutes_per_s = DAY_MINUTES / duration_s
    return {
        "functions": round(FUNCTION_WINDOW_SECONDS * minutes_per_s, 1),
        "router": round(IDLE_SECONDS * minutes_per_s, 1),
    }


def describe_day(workload: Mapping[str, Any]) -> str:
    """Return in a sentence how long the day is, and its windows."""
    windows = workload["window_minutes"]
    return (
        f"A day in {workload['duration_s']:g} s, {workload['requests']} requests: functions end "
        f"after {FUNCTION_WINDOW_SECONDS} s without requests, {windows['functions']:g} minutes of "
        f"the day, and the router after {IDLE_SECONDS} s, {windows['router']:g} minutes."
    )


async def make_model(name: str, cache: Path, quantization: str) -> BenchmarkModel:
    """Return a model that all three servers can serve; made and prepared unless it exists."""
    peers_name = MODELS[name]
    command = (sys.executable, "-m", "benchmarks.peers.models", str(cache), peers_name)
    await asyncio.to_thread(
        subprocess.run, command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    checkpoint = checkpoint_folder(cache, peers_name)
    store = checkpoint.with_name(f"{checkpoint.name}-day-store")
    await prepare_store(checkpoint, store)
    experts_per_function, functions_per_sandbox = function_counts(
        peers_name, functions_per_layer=FUNCTIONS_PER_LAYER, sandboxes=SANDBOXES
    )
    sizes = TaskSizes(PROMPT_CHARACTERS[name])
    model = BenchmarkModel(
        name=name,
        checkpoint=checkpoint,
        store=store,
        dtype=Store.open(store).manifest.model.dtype,
        experts_per_function=experts_per_function,
        functions_per_sandbox=functions_per_sandbox,
        max_model_len=CONTEXT_TOKENS,
        sizes=QUICK_SIZES if name == "tiny" else sizes,
    )
    return await quantized(model, quantization)


async def make_deploys(
    arguments: argparse.Namespace, model: BenchmarkModel, cache: Path
) -> dict[str, Deploy]:
    """Return how each server is deployed; makes what llama.cpp needs."""
    settings = StrategySettings(
        replace(model, store=cache / f"{model.checkpoint.name}-day-store", quantization="none"),
        arguments.tenants,
        {},
        DEFAULT_SETTINGS.implementation,
        DEFAULT_SETTINGS.wait_policy,
    )
    deploys: dict[str, Deploy] = {
        OURS: lambda: running_to_zero(model),
        RESIDENT: lambda: running_full_model(settings),
    }
    if not arguments.without_llama:
        python = await asyncio.to_thread(make_llama_environment, cache / "venv-llama")
        threads = len(os.sched_getaffinity(0))
        server = LlamaServer(cache, SLOTS, threads, python)
        name, quantization = MODELS[model.name], model.quantization
        await asyncio.to_thread(server.prepare, name, quantization)
        deploys[LLAMA] = lambda: running_llama(server, name, quantization)
    return deploys


@asynccontextmanager
async def running_to_zero(model: BenchmarkModel) -> AsyncIterator[Deployed]:
    """Run `faasmoe up` whose functions and router end while nobody uses them."""
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as name:
        folder = Path(name)
        scaling = {"scaling": {"minReplicas": 0, "idleSeconds": IDLE_SECONDS}}
        deployment = model.deployment(folder, EXPERTS, scaling)
        port, log = free_port(), folder / "log"
        words = ("up", "-f", str(deployment.file), "--port", str(port), "--skip-verify")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "faasmoe_operator.cli", *words),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, "XDG_RUNTIME_DIR": name},
            )
        try:
            await wait_serving(process, log)
            yield Deployed(f"http://127.0.0.1:{port}", (process.pid,))
        except Exception as error:
            error.add_note((await asyncio.to_thread(log.read_text))[-4000:])
            raise
        finally:
            await terminate(process)


@asynccontextmanager
async def running_full_model(settings: StrategySettings) -> AsyncIterator[Deployed]:
    """Run one full model in one process."""
    async with full_model_shared(settings) as deployment:
        yield Deployed(deployment.endpoints[0].url, deployment.roots)


@asynccontextmanager
async def running_llama(server: LlamaServer, model: str, precision: str) -> AsyncIterator[Deployed]:
    """Run llama.cpp's server."""
    async with server.run(model, precision) as running:
        yield Deployed(running.url, (running.root.pid,))


async def measure(deploy: Deploy, warm_up: Workload, workload: Workload, *, ends: bool) -> DayRun:
    """Deploy a server, warm it up and meter its day.

    Args:
        deploy: deploys the server.
        warm_up: workload before the day.
        workload: the day.
        ends: whether the server's processes end while it is idle; then the day starts at zero.

    Raises:
        RuntimeError: the warm-up failed, or the server did not go to zero.
    """
    n_tenants = max(warm_up.n_tenants, workload.n_tenants)
    async with deploy() as deployed:
        endpoints = (TenantEndpoint(deployed.url, MODEL_NAME),) * n_tenants
        result = await run_workload(warm_up, endpoints, progress=_nothing, keeps_connections=False)
        errors = [r.error for r in result.results if r.error]
        if errors:
            raise RuntimeError(f"{len(errors)} warm-up requests failed; the first: {errors[0]}")
        if ends:
            await _wait_at_zero(deployed)
        async with metering(ProcessTree(deployed.roots)) as usage:
            result = await run_workload(
                workload, endpoints, progress=_nothing, keeps_connections=False
            )
    return DayRun(result, usage)


def _nothing() -> None:
    """Ignore progress."""


async def _wait_at_zero(deployed: Deployed) -> None:
    deadline_s = time.monotonic() + ZERO_TIMEOUT_S
    while not is_at_zero(deployed.roots[0]):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"router and functions did not end within {ZERO_TIMEOUT_S:g} s")
        await asyncio.sleep(POLL_S)


def is_at_zero(launcher: int) -> bool:
    """Return whether no process of a `faasmoe up` is a router or a sandbox."""
    for process in psutil.Process(launcher).children():
        try:
            is_zygote = any(name in process.cmdline() for name in ZYGOTES)
            if is_zygote and process.children():
                return False
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return True


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the ratios of GB-seconds per token, ours over each of the others, and all days.

    A ratio is None if one of the two generated nothing.
    """
    medians = {name: _median([r["gb_s_per_token"] for r in found]) for name, found in runs.items()}

    def over(name: str) -> float | None:
        ours, theirs = medians[OURS], medians.get(name)
        return None if ours is None or theirs is None else ours / theirs

    return {
        "gb_s_per_token_over_resident": over(RESIDENT),
        "gb_s_per_token_over_llama_cpp": over(LLAMA),
        "failed": sum(run["failed"] for run in runs[OURS]),
        "servers": {name: list(found) for name, found in runs.items()},
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) and known else None


COLUMNS = {
    "gb_s_per_token": "GB s per token",
    "mean_gb": "mean GB",
    "min_gb": "least",
    "max_gb": "most",
    "at_rest": "time at rest",
    "ttft_p50_s": "first token p50, s",
    "ttft_p99_s": "p99",
}
RATIOS = ("gb_s_per_token_over_resident", "gb_s_per_token_over_llama_cpp")


def format_day(figures: Mapping[str, Any]) -> str:
    """Return the days and ratios as text."""
    header = ("", *(title.upper() for title in COLUMNS.values()), "FAILED")
    ratios = "\n".join(f"{name}: {_number(figures[name])}" for name in RATIOS)
    return f"{format_table(header, _rows(figures))}\n\n{ratios}"


def markdown(figures: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Return the days and ratios as a page."""
    model, machine = about["model"], about["machine"]
    header = ("", *COLUMNS.values(), "failed")
    lines = [header, ["---"] * len(header), *_rows(figures)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    ratios = "\n".join(f"- `{name}`: {_number(figures[name])}" for name in RATIOS)
    return (
        f"# A bursty day\n\n{describe_day(about['workload'])} Model {model['name']}, "
        f"{model['quantization']}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['date']}.\n\n{table}\n\n{ratios}\n"
    )


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (TITLES[name], *(_number(run[column]) for column in COLUMNS), str(run["failed"]))
        for name, runs in figures["servers"].items()
        for run in runs
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
