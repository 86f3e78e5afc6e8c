"""`faasmoe bench sweep`: cost by number of experts per function, as in the paper's figure 5."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.evaluation import paper, report, workload
from benchmarks.evaluation.compare import Comparison, ComparisonPlan, describe_plan
from benchmarks.evaluation.full_model_tuning import DEFAULT_SETTINGS
from benchmarks.evaluation.models import BenchmarkModel
from benchmarks.evaluation.options import QUICK_TENANTS, add_model_options, make_chosen_model
from benchmarks.evaluation.results import to_json
from benchmarks.evaluation.strategies import FUNCTIONS_SHARED, LOCAL_DISTRIBUTION, StrategySettings
from benchmarks.evaluation.workload import TENANTS
from benchmarks.report import describe_machine

from faasmoe_operator.cli.signals import run_until_signal

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30, 60)
STRATEGIES = (FUNCTIONS_SHARED, LOCAL_DISTRIBUTION)
ALL_FUNCTIONS_ACTIVE: Mapping[str, Any] = {
    "warmPool": 0,  # measures the memory of functions only
    "scaling": {"minScale": 1},
}


def add_command(commands: Any) -> None:
    """Add `faasmoe bench sweep`."""
    parser = commands.add_parser(
        "sweep",
        help="compare function sizes",
        description="Run the same workload with functions of different sizes and with one\n"
        "resident expert server, and recommend a size.",
        epilog="Example:\n  faasmoe bench sweep --sizes 1,2,4,8 --without-local",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=SIZES,
        metavar="N,N",
        help="experts of one layer per function; sizes above the model's number of experts are "
        f"skipped (default: {','.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--tenants", type=int, default=TENANTS, help="number of tenants (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="rounds of 30 requests per run (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each size (default: %(default)s)"
    )
    parser.add_argument(
        "--without-local", action="store_true", help="skip the resident expert server"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep; write figures, table, plots and HTML page."""
    return asyncio.run(run_until_signal(_run(arguments)))


async def _run(arguments: argparse.Namespace) -> int:
    machine = describe_machine()
    plans = _plans(arguments, await make_chosen_model(arguments))
    comparisons = await _sweep(plans, 1 if arguments.quick else arguments.repeats)
    results = {
        "about": {
            "machine": machine,
            "seed": arguments.seed,
            **describe_plan(next(iter(plans.values()))),
        },
        "sizes": {
            str(size): to_json(comparison.results(), reference=LOCAL_DISTRIBUTION)
            for size, comparison in comparisons.items()
        },
    }
    report.write("sweep", results, folder=arguments.out.resolve())
    return 0


async def _sweep(plans: Mapping[int, ComparisonPlan], repeats: int) -> Mapping[int, Comparison]:
    """Run each size once per repetition, in alternating order."""
    comparisons = {size: Comparison(plan) for size, plan in plans.items()}
    for number in range(repeats):
        order = list(comparisons) if number % 2 == 0 else list(reversed(comparisons))
        for size in order:
            print(f"repetition {number + 1} of {repeats}, {size} experts per function", flush=True)
            await comparisons[size].run()
    return comparisons


def _plans(arguments: argparse.Namespace, model: BenchmarkModel) -> dict[int, ComparisonPlan]:
    tenants = QUICK_TENANTS if arguments.quick else arguments.tenants
    n_experts = int(model.describe()["experts"])
    measured_workload = workload.rounds_workload(
        arguments.rounds, seed=arguments.seed, sizes=model.sizes, tenants=tenants
    )
    plan = ComparisonPlan(
        settings=StrategySettings(
            model, tenants, ALL_FUNCTIONS_ACTIVE, DEFAULT_SETTINGS.implementation
        ),
        workload=measured_workload,
        warm_up=paper.warm_up_workload(model, tenants),
        strategies=(FUNCTIONS_SHARED,) if arguments.without_local else STRATEGIES,
        repeats=1,
    )
    sizes = [size for size in arguments.sizes if size <= n_experts]
    return {size: _plan_for_size(plan, size) for size in sizes}


def _plan_for_size(plan: ComparisonPlan, size: int) -> ComparisonPlan:
    model = plan.settings.model.with_changes(experts_per_function=size)
    return replace(plan, settings=replace(plan.settings, model=model))


def _sizes(text: str) -> Sequence[int]:
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected comma-separated integers of 1 or more"
        )
    return sizes
