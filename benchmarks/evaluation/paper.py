"""`faasmoe bench paper`: compares all strategies on one workload, as in the paper."""

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
WARM_UP_FRACTION = 0.25  # short outputs suffice, because prefill touches the weights
KNATIVE_EXPERTS: Mapping[str, Any] = {"warmPool": 1}  # scaling windows are Knative's defaults
COMPRESSED_DAY_EXPERTS: Mapping[str, Any] = {
    # Knative's minimum window. In a day of 4 minutes it stands for 36 minutes, so that functions
    # hold memory for longer than with windows of a minute in a real day.
    "warmPool": 1,
    "scaling": {
        "windowSeconds": 6,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    },
}


def add_command(commands: Any) -> None:
    """Add `faasmoe bench paper`."""
    parser = commands.add_parser(
        "paper",
        help="compare all strategies on one workload",
        description="Run the same workload with every strategy in turn and compare: a full model\n"
        "per tenant, a shared full model, local distribution, functions with a router per\n"
        "tenant, and functions with a shared router.",
        epilog="Examples:\n"
        "  faasmoe bench paper --quick\n"
        "  faasmoe bench paper --workload day --strategies full-model-shared,functions-shared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--workload",
        choices=(ROUNDS, POISSON, DAY),
        default=ROUNDS,
        help="the paper's rounds of 30 requests, Poisson arrivals, or a compressed day with bursts "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--strategies",
        type=_strategies,
        default=tuple(STRATEGIES),
        metavar="NAME,NAME",
        help=f"strategies to compare: {', '.join(STRATEGIES)} (default: all)",
    )
    parser.add_argument(
        "--tenants", type=int, default=TENANTS, help="number of tenants (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="rounds per run of `rounds` (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each strategy (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=0.5,
        help="requests per second of `poisson` (default: %(default)s)",
    )
    parser.add_argument(
        "--requests", type=int, default=60, help="requests of `day` (default: %(default)s)"
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=240.0,
        metavar="S",
        help="duration of `poisson` and `day` in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="S",
        help="start no repetition that would end later than this many seconds (default: none)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison; write figures, table, plots and HTML page."""
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
    """Return a workload that touches all weights, to run before the measured one."""
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
