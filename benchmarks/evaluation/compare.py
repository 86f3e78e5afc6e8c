"""All strategies in turn, several times over, on the same model and the same workload.

One strategy runs at a time: several at once would share pages of libraries and the processor, and
nobody could say whose they are. Who begins changes each time, so that drift in the machine's speed
falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evaluation.results import StrategyResult
from benchmarks.evaluation.run import StrategyRun, measure_strategy
from benchmarks.evaluation.strategies import FULL_MODEL_PER_TENANT, STRATEGIES, StrategySettings
from benchmarks.evaluation.workload import Workload
from tqdm import tqdm

PROCESS_BYTES = 700 << 20  # runtime, cache and activations of one process


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What is compared.

    Attributes:
        settings: of the strategies.
        workload: what is measured, the same in every run.
        warm_up: what is played before.
        strategies: their names, in order.
        repeats: runs of each.
        time_limit_s: no repetition begins that would end later than this, but for the first.
        interval_s: between readings of memory.
    """

    settings: StrategySettings
    workload: Workload
    warm_up: Workload
    strategies: Sequence[str]
    repeats: int
    time_limit_s: float = float("inf")
    interval_s: float = 0.5


@dataclass(slots=True)
class Comparison:
    """A comparison that runs; `run` fills it.

    Attributes:
        plan: what is compared.
        runs: each strategy's, so far.
    """

    plan: ComparisonPlan
    runs: dict[str, list[StrategyRun]] = field(default_factory=dict)

    async def run(self) -> None:
        """Run every strategy as often as the plan says and its time allows."""
        started_s, longest_s = time.monotonic(), 0.0
        for number in range(self.plan.repeats):
            if number and time.monotonic() - started_s + longest_s > self.plan.time_limit_s:
                print(f"time is up after {number} of {self.plan.repeats} repetitions", flush=True)
                return
            repetition_s = time.monotonic()
            for name in rotated(self.plan.strategies, number):
                print(f"repetition {number + 1} of {self.plan.repeats}: {name}", flush=True)
                self.runs.setdefault(name, []).append(await self._measure(name))
            longest_s = max(longest_s, time.monotonic() - repetition_s)

    def results(self) -> dict[str, StrategyResult]:
        """Return what was found, in the plan's order."""
        return {
            name: StrategyResult(STRATEGIES[name].title, tuple(self.runs[name]))
            for name in self.plan.strategies
            if name in self.runs
        }

    async def _measure(self, name: str) -> StrategyRun:
        plan = self.plan
        with _progress_bar(name, plan.workload) as bar:
            run = await measure_strategy(
                STRATEGIES[name],
                plan.settings,
                warm_up=plan.warm_up,
                workload=plan.workload,
                progress=bar.update,
                interval_s=plan.interval_s,
            )
        print(f"  {summarize(run)}", flush=True)
        return run


def check_memory_fits(plan: ComparisonPlan, available_bytes: int) -> None:
    """Raise SystemExit if a full model for each tenant would not fit into the memory there is."""
    if FULL_MODEL_PER_TENANT not in plan.strategies:
        return
    tenants = plan.settings.tenants
    needed = tenants * (plan.settings.model.floor_bytes + PROCESS_BYTES)
    if needed > available_bytes:
        raise SystemExit(
            f"{FULL_MODEL_PER_TENANT}: {tenants} of the model take {needed / 1e9:.1f} GB, and "
            f"{available_bytes / 1e9:.1f} GB are available; leave it out by --strategies, or take "
            "fewer --layers or --tenants"
        )


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the names, begun with another one each time."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def summarize(run: StrategyRun) -> str:
    """Return a run's figures in a line."""
    found = run.figures()

    def value(name: str) -> float:
        number = found[name]
        return float("nan") if number is None else number

    return (
        f"{value('tokens_per_s'):.1f} tokens/s, first token {value('ttft_p50_s'):.2f} s, "
        f"{1e3 * value('tpot_p50_s'):.0f} ms a token, {1e3 * value('cpu_s_per_token'):.0f} CPU ms "
        f"and {value('gb_s_per_token'):.3f} GB s a token, peak {value('peak_gb'):.2f} GB, "
        f"{value('failures'):.0f} failed"
    )


def _progress_bar(name: str, workload: Workload) -> tqdm[Any]:
    # None: no bar where nobody watches, such as in a log file.
    return tqdm(total=len(workload.requests), desc=name, unit="request", leave=False, disable=None)


def describe_plan(plan: ComparisonPlan) -> Mapping[str, Any]:
    """Return what a report says of the plan."""
    workload = plan.workload
    return {
        "workload": {
            "name": workload.name,
            "digest": workload.digest,
            "tenants": workload.n_tenants,
            "requests": len(workload.requests),
            "tokens": workload.n_tokens,
            "duration_s": workload.duration_s,
        },
        "model": plan.settings.model.describe(),
        "experts": dict(plan.settings.experts),
        "full_model": {
            "experts_implementation": {
                "alone": plan.settings.experts_implementation(1),
                "shared": plan.settings.experts_implementation(plan.settings.tenants),
            },
            "wait": {"alone": "PASSIVE", "shared": plan.settings.wait_policy},
        },
    }
