"""`faasmoe bench paper`: the paper's comparison, and ours, in one table."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.evaluation import report, workload
from benchmarks.evaluation.compare import (
    Comparison,
    ComparisonPlan,
    check_memory_fits,
    describe_plan,
)
from benchmarks.evaluation.full_model_tuning import DEFAULT_SETTINGS, tune_full_model
from benchmarks.evaluation.models import BenchmarkModel
from benchmarks.evaluation.options import QUICK_TENANTS, add_model_options, make_chosen_model
from benchmarks.evaluation.results import to_json
from benchmarks.evaluation.strategies import FULL_MODEL_SHARED, STRATEGIES, StrategySettings
from benchmarks.evaluation.workload import TENANTS, Workload
from benchmarks.report import describe_machine, memory_bytes

from faasmoe_operator.cli.signals import run_until_signal

ROUNDS, POISSON, DAY = "rounds", "poisson", "day"
WARM_UP_SEED = -1
WARM_UP_FRACTION = 0.25  # of the answers: what is to be touched, prompts touch
KNATIVE_EXPERTS: Mapping[str, Any] = {
    "warmPool": 1
}  # windows and grace period are Knative's defaults
COMPRESSED_DAY_EXPERTS: Mapping[str, Any] = {
    # Knative's least window. In a day of 4 minutes it stands for 36 minutes, so that we hold
    # memory for longer than a real day's windows of a minute would.
    "warmPool": 1,
    "scaling": {
        "windowSeconds": 6,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    },
}


def add_command(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "paper",
        help="all strategies on one workload",
        description="Serve the same workload by every strategy in turn and compare: full model per "
        "tenant, one shared, local distribution, functions with private and with shared routers.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--workload", choices=(ROUNDS, POISSON, DAY), default=ROUNDS, help="the paper's rounds of "
        "30 requests, random arrivals, or a bursty day compressed (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--strategies", type=_strategies, default=tuple(STRATEGIES), metavar="NAME,NAME",
        help=f"of {', '.join(STRATEGIES)} (all)",
    )  # fmt: skip
    parser.add_argument("--tenants", type=int, default=TENANTS, help="how many (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of a run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second (%(default)s)")
    parser.add_argument("--requests", type=int, default=60, help="of a day (%(default)s)")
    parser.add_argument(
        "--duration", type=float, default=240.0, metavar="S", help="of random arrivals or of the "
        "day (%(default)s s)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="S", help="begin no repetition "
        "that would end later",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; write figures, table, plots and page."""
    return asyncio.run(run_until_signal(_run(arguments)))


async def _run(arguments: argparse.Namespace) -> int:
    machine = describe_machine()
    plan = await _plan(arguments)
    check_memory_fits(plan, memory_bytes("MemAvailable"))
    comparison = Comparison(plan)
    await comparison.run()
    results = to_json(comparison.results(), reference=FULL_MODEL_SHARED)
    results["about"] = {"machine": machine, "seed": arguments.seed, **describe_plan(plan)}
    name = "paper" if arguments.workload == ROUNDS else arguments.workload
    report.write(name, results, folder=arguments.out.resolve())
    return 0


async def _plan(arguments: argparse.Namespace) -> ComparisonPlan:
    model = await make_chosen_model(arguments)
    tenants = QUICK_TENANTS if arguments.quick else arguments.tenants
    best = (
        DEFAULT_SETTINGS if arguments.quick else await tune_full_model(model, sorted({1, tenants}))
    )
    return ComparisonPlan(
        settings=StrategySettings(
            model=model,
            tenants=tenants,
            experts=COMPRESSED_DAY_EXPERTS if arguments.workload == DAY else KNATIVE_EXPERTS,
            experts_implementation=best.implementation,
            wait_policy=best.wait_policy,
        ),
        workload=_workload(arguments, model, tenants),
        warm_up=warm_up_workload(model, tenants),
        strategies=arguments.strategies,
        repeats=1 if arguments.quick else arguments.repeats,
        time_limit_s=arguments.time_limit,
    )


def warm_up_workload(model: BenchmarkModel, tenants: int) -> Workload:
    """Return what is played before a workload, so that all weights have been touched."""
    sizes = replace(model.sizes, output_fraction=WARM_UP_FRACTION * model.sizes.output_fraction)
    return workload.rounds_workload(1, seed=WARM_UP_SEED, sizes=sizes, tenants=tenants)


def _workload(arguments: argparse.Namespace, model: BenchmarkModel, tenants: int) -> Workload:
    seed, sizes, duration_s = arguments.seed, model.sizes, arguments.duration
    if arguments.workload == ROUNDS:
        return workload.rounds_workload(arguments.rounds, seed=seed, sizes=sizes, tenants=tenants)
    if arguments.workload == POISSON:
        rate = arguments.rate
        return workload.poisson_workload(rate, duration_s, seed=seed, sizes=sizes, tenants=tenants)
    n_requests = arguments.requests
    return workload.day_workload(n_requests, duration_s, seed=seed, sizes=sizes, tenants=tenants)


def _strategies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in STRATEGIES:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected {', '.join(STRATEGIES)}")
    return names
