"""`faasmoe bench limited`: a model that is larger than the memory it may use.

Runs `faasmoe up` without a limit and with one, in turns, and compares speed, failures and greedy
texts. The limit is a fraction of the experts' bytes: `functions` is `experts.memory` of the
MoEModel, `cgroup` bounds the memory of all processes together, page cache included.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import psutil
from benchmarks.evaluation import memory_group
from benchmarks.evaluation.client import WorkloadResult, run_workload
from benchmarks.evaluation.meter import ProcessTree, metering
from benchmarks.evaluation.models import BenchmarkModel, make_random_model, quantized
from benchmarks.evaluation.options import QUICK_SIZES, add_model_options, make_chosen_model
from benchmarks.evaluation.results import text_agreement
from benchmarks.evaluation.run import StrategyRun, counter_deltas, scrape_counters
from benchmarks.evaluation.strategies import StrategySettings, functions_shared
from benchmarks.evaluation.workload import Workload, rounds_workload
from benchmarks.geometry import CheckpointGeometry
from benchmarks.report import describe_machine, write_figures

from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.cli.signals import run_until_signal

UNLIMITED, FUNCTIONS, CGROUP = "unlimited", "functions", "cgroup"
LIMITS = (FUNCTIONS, CGROUP)
BATCH = 8
QUICK_GEOMETRY = CheckpointGeometry(
    2, 512, 128, 4, 16, 2, 256, 128
)  # experts.memory is 1Mi or more
WARM_UP_SEED = -1
OVERHEAD_BYTES = 900 << 20  # processes without pages of the store: about 0.7 GB, and the KV cache
EXPERTS: Mapping[str, Any] = {"warmPool": 1, "scaling": {"windowSeconds": 600}}


@dataclass(frozen=True, slots=True)
class LimitedPlan:
    """The extent of the benchmark.

    Attributes:
        model: the model.
        limit: one of LIMITS.
        limit_bytes: size of the experts that may be in memory.
        workload: the measured workload, its tenants are the batch.
        warm_up: workload before each measurement.
        repeats: pairs of runs.
    """

    model: BenchmarkModel
    limit: str
    limit_bytes: int
    workload: Workload
    warm_up: Workload
    repeats: int

    @property
    def group_bytes(self) -> int:
        """Memory of all processes with a cgroup: the router's weights and what is not weights."""
        router_bytes = self.model.floor_bytes - self.model.experts_bytes
        return self.limit_bytes + router_bytes + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """One run.

    Attributes:
        run: what was measured.
        warm_up: outcome of the requests before.
        read_bytes: bytes that its processes read from the disk meanwhile.
    """

    run: StrategyRun
    warm_up: WorkloadResult
    read_bytes: int = 0

    @property
    def failed(self) -> int:
        """Number of failed requests, those of the warm-up included."""
        results = (*self.warm_up.results, *self.run.workload_result.results)
        return sum(bool(result.error) for result in results)

    @property
    def texts(self) -> dict[str, str]:
        """Generated texts by request."""
        return {f"{r.tenant}-{r.number}": r.text for r in self.run.successful_results}

    def figures(self) -> dict[str, Any]:
        """Return the figures of the run."""
        figures = self.run.figures()
        keys = ("tokens_per_s", "ttft_p50_s", "tpot_p50_s", "cpu_s_per_token", "peak_gb", "tokens")
        counters = self.run.counters
        tokens = self.run.n_tokens or float("nan")
        errors = [r.error for r in self.run.workload_result.results if r.error]
        return {key: figures[key] for key in keys} | {
            "failed": self.failed,
            "activations_per_token": counters["activations"] / tokens,
            "local_per_token": counters["local"] / tokens,
            "colocated_per_token": counters["colocated"] / tokens,
            "calls_per_token": counters["calls"] / tokens,
            "read_mb_per_token": self.read_bytes / 1e6 / tokens,
            "errors": sorted(set(errors))[:5],
        }


def add_command(commands: Any) -> None:
    """Add `faasmoe bench limited`."""
    parser = commands.add_parser(
        "limited",
        help="compare a limit of half the experts with no limit",
        description="Serve a model with memory for a part of its experts and without a limit, in\n"
        "turns, and compare tokens/s, failures and greedy texts.",
        epilog="Example:\n  faasmoe bench limited --model qwen1.5-moe --quantization int8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--limit",
        choices=LIMITS,
        default=FUNCTIONS,
        help="functions: experts.memory; cgroup: a control group around all processes, whose page "
        "cache counts (default: %(default)s)",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.5,
        help="part of the experts' bytes that may be in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="concurrent requests (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="tasks of each kind and client (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="pairs of runs (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; write limited.json."""
    return asyncio.run(run_until_signal(_run(arguments)))


async def _run(arguments: argparse.Namespace) -> int:
    machine = describe_machine()
    plan = await _plan(arguments)
    runs: dict[str, list[LimitedRun]] = {UNLIMITED: [], plan.limit: []}
    for number in range(plan.repeats):
        names = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in names:
            found = await measure(plan, is_limited=name != UNLIMITED)
            runs[name].append(found)
            speed = found.figures()["tokens_per_s"]
            print(f"  {name}: {speed:.1f} tokens/s, {found.failed} failed", flush=True)
    figures = compare(runs[UNLIMITED], runs[plan.limit])
    about = {
        "limit": plan.limit,
        "limit_bytes": plan.limit_bytes,
        "experts_bytes": plan.model.experts_bytes,
        "group_bytes": plan.group_bytes if plan.limit == CGROUP else None,
        "batch": plan.workload.n_tenants,
        "model": plan.model.describe(),
        "machine": machine,
    }
    print(f"\n{format_limited(figures)}")
    print(f"figures: {write_figures('limited', figures | about, folder=arguments.out.resolve())}")
    return 0


async def _plan(arguments: argparse.Namespace) -> LimitedPlan:
    if not 0 < arguments.fraction <= 1:
        raise SystemExit(f"--fraction: got {arguments.fraction}, expected more than 0, at most 1")
    if arguments.quick:
        model = await make_random_model(
            QUICK_GEOMETRY, arguments.cache.resolve(), experts_per_function=4, sizes=QUICK_SIZES
        )
        model = await quantized(model, arguments.quantization)
    else:
        model = await make_chosen_model(arguments)
    short = replace(model.sizes, output_fraction=0.25 * model.sizes.output_fraction)
    seed, batch = arguments.seed, arguments.batch
    return LimitedPlan(
        model=model,
        limit=arguments.limit,
        limit_bytes=int(arguments.fraction * model.experts_bytes),
        workload=rounds_workload(arguments.rounds, seed=seed, sizes=model.sizes, tenants=batch),
        warm_up=rounds_workload(1, seed=WARM_UP_SEED, sizes=short, tenants=batch),
        repeats=1 if arguments.quick else arguments.repeats,
    )


async def measure(plan: LimitedPlan, *, is_limited: bool) -> LimitedRun:
    """Start `faasmoe up`, warm it up and measure the workload; failures are counted."""
    experts = dict(EXPERTS)
    if is_limited and plan.limit == FUNCTIONS:
        experts["memory"] = str(plan.limit_bytes)
    settings = StrategySettings(plan.model, plan.workload.n_tenants, experts, lambda _: "")
    is_grouped = is_limited and plan.limit == CGROUP
    async with _group(plan) if is_grouped else nullcontext(), functions_shared(settings) as up:
        warm_up = await run_workload(plan.warm_up, up.endpoints, progress=lambda: None)
        tree = ProcessTree(up.roots)
        before, read_before = await scrape_counters(up.router_urls, up.control_url), _read(tree)
        async with metering(tree) as usage:
            result = await run_workload(plan.workload, up.endpoints, progress=lambda: None)
        after, read_after = await scrape_counters(up.router_urls, up.control_url), _read(tree)
    measured = StrategyRun(result, usage, counter_deltas(before, after))
    read_bytes = sum(n - read_before.get(pid, 0) for pid, n in read_after.items())
    return LimitedRun(measured, warm_up, read_bytes)


def _read(tree: ProcessTree) -> dict[int, int]:
    """Return the bytes that each process has read from the disk, page faults included."""
    found: dict[int, int] = {}
    for process in tree.processes():
        try:
            found[process.pid] = process.io_counters().read_bytes
        except psutil.NoSuchProcess:
            continue  # it has just ended
    return found


@asynccontextmanager
async def _group(plan: LimitedPlan) -> AsyncIterator[None]:
    """Have processes that are started in the context live in a limited control group."""
    memory_group.drop_cached(plan.model.store, plan.model.checkpoint)
    with memory_group.limited_children(plan.group_bytes):
        yield


def compare(unlimited: Sequence[LimitedRun], limited: Sequence[LimitedRun]) -> dict[str, Any]:
    """Return the figures of both and their comparison.

    Every run's texts are compared with those of the first run without a limit.
    """
    reference = unlimited[0].texts
    ratios = [
        b.figures()["tokens_per_s"] / a.figures()["tokens_per_s"]
        for a, b in zip(unlimited, limited, strict=True)
    ]
    return {
        "tokens_ratio": statistics.median(ratios),
        "failed": sum(run.failed for run in limited),
        "changed": sum(_changed(reference, run.texts) for run in limited),
        "tokens_ratios": ratios,
        "failed_unlimited": sum(run.failed for run in unlimited),
        "changed_unlimited": sum(_changed(reference, run.texts) for run in unlimited[1:]),
        "texts": len(reference),
        "equal_characters": _equal_characters(reference, limited),
        "unlimited": [run.figures() for run in unlimited],
        "limited": [run.figures() for run in limited],
    }


def _changed(reference: Mapping[str, str], texts: Mapping[str, str]) -> int:
    """Return how many requests that both completed have another text."""
    return sum(text != reference[name] for name, text in texts.items() if name in reference)


def _equal_characters(reference: Mapping[str, str], runs: Sequence[LimitedRun]) -> float | None:
    agreements = [text_agreement(run.texts, reference) for run in runs]
    found = [a.equal_characters for a in agreements if a is not None]
    return statistics.mean(found) if found else None


def format_limited(figures: Mapping[str, Any]) -> str:
    """Return the comparison as a table."""
    rows = [
        (
            name,
            f"{run['tokens_per_s']:.1f}",
            f"{run['failed']}",
            f"{run['local_per_token'] + run['colocated_per_token']:.2f}",
            f"{run['calls_per_token']:.2f}",
            f"{run['activations_per_token']:.3f}",
            f"{run['read_mb_per_token']:.1f}",
            f"{run['peak_gb']:.2f}",
        )
        for name in ("unlimited", "limited")
        for run in figures[name]
    ]
    header = (
        "",
        "TOKENS/S",
        "FAILED",
        "IN ROUTER/TOKEN",
        "CALLS/TOKEN",
        "ACTIVATIONS/TOKEN",
        "MB READ/TOKEN",
        "PEAK GB",
    )
    return (
        f"{format_table(header, rows)}\n\n"
        f"tokens_ratio {figures['tokens_ratio']:.3f}, failed {figures['failed']}, "
        f"changed {figures['changed']} of {figures['texts']} texts "
        f"({figures['changed_unlimited']} between runs without a limit)"
    )
