"""Repeated runs of all strategies with the same model and workload.

Strategies run one at a time, because concurrent ones would share library pages and CPU time that
could not be attributed. The order rotates between repetitions, so that drift in the machine's speed
affects all strategies equally.
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

PROCESS_BYTES = 700 << 20  # runtime, KV cache and activations of one process


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """The extent of a comparison.

    Attributes:
        settings: settings of the strategies.
        workload: the measured workload, the same in every run.
        warm_up: workload before the measurement.
        strategies: names of the strategies, in order.
        repeats: runs of each strategy.
        time_limit_s: no repetition after the first starts if it would probably end later.
        interval_s: interval between memory samples.
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
    """A comparison in progress.

    Attributes:
        plan: the extent of the comparison.
        runs: completed runs by strategy.
    """

    plan: ComparisonPlan
    runs: dict[str, list[StrategyRun]] = field(default_factory=dict)

    async def run(self) -> None:
        """Run all repetitions that fit into the time limit."""
        started_s, longest_s = time.monotonic(), 0.0
        for number in range(self.plan.repeats):
            if number and time.monotonic() - started_s + longest_s > self.plan.time_limit_s:
                print(f"time limit: stopped after {number} of {self.plan.repeats} repetitions")
                return
            repetition_s = time.monotonic()
            for name in rotated(self.plan.strategies, number):
                print(f"repetition {number + 1} of {self.plan.repeats}: {name}", flush=True)
                self.runs.setdefault(name, []).append(await self._measure(name))
            longest_s = max(longest_s, time.monotonic() - repetition_s)

    def results(self) -> dict[str, StrategyResult]:
        """Return the results of all strategies in the order of the plan."""
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
    """Raise SystemExit if one full model per tenant does not fit into the available memory."""
    if FULL_MODEL_PER_TENANT not in plan.strategies:
        return
    tenants = plan.settings.tenants
    needed = tenants * (plan.settings.model.floor_bytes + PROCESS_BYTES)
    if needed > available_bytes:
        raise SystemExit(
            f"{FULL_MODEL_PER_TENANT}: {tenants} copies of the model need {needed / 1e9:.1f} GB, "
            f"but only {available_bytes / 1e9:.1f} GB are available; exclude it with --strategies, "
            "or reduce --layers or --tenants"
        )


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the names rotated left by `number`."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def summarize(run: StrategyRun) -> str:
    """Return the main figures of a run as one line."""
    figures = run.figures()

    def value(name: str) -> float:
        number = figures[name]
        return float("nan") if number is None else number

    return (
        f"{value('tokens_per_s'):.1f} tokens/s, first token {value('ttft_p50_s'):.2f} s, "
        f"{1e3 * value('tpot_p50_s'):.0f} ms per token, "
        f"{1e3 * value('cpu_s_per_token'):.0f} CPU ms and "
        f"{value('gb_s_per_token'):.3f} GB s per token, peak {value('peak_gb'):.2f} GB, "
        f"{value('failures'):.0f} failed"
    )


def _progress_bar(name: str, workload: Workload) -> tqdm[Any]:
    # disable=None: no bar if stderr is not a terminal.
    return tqdm(total=len(workload.requests), desc=name, unit="request", leave=False, disable=None)


def describe_plan(plan: ComparisonPlan) -> Mapping[str, Any]:
    """Return the description of the plan for reports."""
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
