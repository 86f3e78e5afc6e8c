"""How CPU time and memory grow with functions, routers, tenants and models.

`python -m benchmarks.growth` measures the pure policies and messages in this process, without
servers: processor time, the least of several repetitions, so it depends little on what else runs.
Models are real: `faasmoe up` with so many of them, at rest (growth_models.py).
The exponent is the slope between the two largest sizes on logarithmic axes: 1 is linear.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.evaluation.options import CACHE
from benchmarks.growth_models import measure_models, rows_of
from benchmarks.report import OUT, describe_machine, write_figures

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.control.autoscalers import FunctionAutoscalers
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.load_reports import LoadReports
from faasmoe_operator.control.routing_table import RoutingTablePublisher
from faasmoe_operator.plan.fleet import (
    Assignment,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.sandboxes import plan_sandboxes
from faasmoe_operator.scaling import ScalingSettings
from faasmoe_router.engine.fair_queue import FairQueue, Share

N_FUNCTIONS = (10, 100, 1_000, 10_000)
N_ROUTERS = (1, 4, 16, 64)
N_TENANTS = (1, 10, 100, 1_000)
N_MODELS = (1, 20, 200)
FUNCTIONS_PER_SANDBOX = 30
REPORTED_FUNCTIONS = 100
SLOTS = 32
EXPLAINED_EXPONENT = 1.15  # above it a row needs a reason
REPEATS = 5


def cpu_s(call: Callable[[], object]) -> float:
    """Return the least processor time of one call, of several, in seconds."""
    times_s = []
    for _ in range(REPEATS):
        gc.collect()
        started_s = time.process_time()
        call()
        times_s.append(time.process_time() - started_s)
    return min(times_s)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Have the collector skip what exists, which each of hundreds of collections would visit."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def allocated_bytes(make: Callable[[], object]) -> int:
    """Return the memory that what `make` returns holds."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    size_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return size_bytes


def exponent(values: Mapping[int, float]) -> float:
    """Return the slope between the two largest sizes on logarithmic axes."""
    (small, low), (large, high) = sorted(values.items())[-2:]
    return math.log(max(high, 1e-9) / max(low, 1e-9)) / math.log(large / small)


def make_functions(count: int) -> list[ManagedFunction]:
    """Return functions, three to a layer."""
    return [
        ManagedFunction(FunctionSpec(f"f{n}", (n // 3,), (n % 3,)), 1 << 20, ScalingSettings())
        for n in range(count)
    ]


def make_sandboxes(
    functions: Sequence[ManagedFunction], *, attached: bool
) -> list[ObservedSandbox]:
    """Return as many ready sandboxes as the functions need, with or without them."""
    starts = range(0, len(functions), FUNCTIONS_PER_SANDBOX)
    return [
        ObservedSandbox(
            f"s{start}",
            SandboxState.READY,
            "template",
            assignments=tuple(
                Assignment(f.id, memory_bytes=f.size_bytes, anti_affinity_key=f.anti_affinity_key)
                for f in functions[start : start + FUNCTIONS_PER_SANDBOX]
            )
            if attached
            else (),
        )
        for start in starts
    ]


def measure_tick(count: int) -> float:
    """Return the CPU seconds of one tick under load: observe and decide."""
    functions = make_functions(count)
    loads = {function.id: 0.5 for function in functions}
    ready = {function.id: 1 for function in functions}
    autoscalers = FunctionAutoscalers(functions, observed=None, now=0.0)
    for second in range(70):
        autoscalers.observe(loads, now=second + 0.5)
        if second > 64:
            autoscalers.decide(ready, now=second + 0.5)
    return cpu_s(lambda: autoscalers.decide(ready, now=70.5))


def measure_plan(count: int, *, attached: bool) -> float:
    """Return the CPU seconds of a plan that places all functions, or changes nothing."""
    functions = make_functions(count)
    demands = [FunctionDemand(f.id, 1, f.size_bytes, f.anti_affinity_key) for f in functions]
    sandboxes = make_sandboxes(functions, attached=attached)
    settings = FleetSettings("template", shape=SandboxShape(FUNCTIONS_PER_SANDBOX), warm_pool=0)
    return cpu_s(lambda: plan_sandboxes(settings, demands, sandboxes=sandboxes, now=0.0))


def measure_table(count: int) -> float:
    """Return the CPU seconds to publish the addresses of all functions and encode the table."""
    specs = [function.spec for function in make_functions(count)]

    def publish() -> str:
        publisher = RoutingTablePublisher(specs, model_digest="digest")
        publisher.publish({spec.id: ("127.0.0.1:1",) for spec in specs})
        return json.dumps(publisher.table.to_json())

    return cpu_s(publish)


def autoscaler_bytes(count: int) -> float:
    """Return the memory of all autoscalers with full windows."""

    def make() -> FunctionAutoscalers:
        functions = make_functions(count)
        autoscalers = FunctionAutoscalers(functions, observed=None, now=0.0)
        autoscalers.observe(dict.fromkeys((f.id for f in functions), 0.5), now=0.5)
        return autoscalers

    return float(allocated_bytes(make))


def measure_reports(count: int) -> float:
    """Return the CPU seconds to add up the reports of all routers."""
    reports = LoadReports(now=0.0)
    load = FunctionLoad(0.5, 1, 1)
    functions = {f"f{n}": load for n in range(REPORTED_FUNCTIONS)}
    for n in range(count):
        reports.add(LoadReport(f"r{n}", functions), now=0.0)
    return cpu_s(lambda: reports.concurrency(0.5))


def measure_queue(count: int, *, n_active: int) -> float:
    """Return the CPU seconds of one request through the fair queue.

    Args:
        count: tenants with a share.
        n_active: tenants that keep a request waiting meanwhile, besides a full batch.
    """
    queue = FairQueue(slots=SLOTS, max_queued=1 << 20)
    queue.set_shares({f"t{n}": Share() for n in range(count)})
    for n in range(count):  # every tenant has been there
        queue.push(f"t{n}", "old", n_prompt_tokens=10)
        queue.pop()
        queue.remove("old")
    for n in range(SLOTS):
        queue.push(f"t{n % count}", f"running{n}", n_prompt_tokens=10)
        queue.pop()
    for n in range(n_active):
        queue.push(f"t{n % count}", f"waiting{n}", n_prompt_tokens=10)
    n_requests = 20

    def serve() -> None:
        for n in range(n_requests):
            queue.check_capacity("t0", 1)
            queue.push("t0", f"new{n}", n_prompt_tokens=10)
            queue.preempt()
            queue.remove(f"new{n}")

    return cpu_s(serve) / n_requests


ROWS: Mapping[str, tuple[str, Sequence[int], Callable[[int], float], str]] = {
    "tick of the autoscalers, s": ("functions", N_FUNCTIONS, measure_tick, ""),
    "plan without a change, s": (
        "functions",
        N_FUNCTIONS,
        lambda n: measure_plan(n, attached=True),
        "",
    ),
    "plan that places all, s": (
        "functions",
        N_FUNCTIONS,
        lambda n: measure_plan(n, attached=False),
        "each function looks for a sandbox that fits; sandboxes grow with functions",
    ),
    "whole routing table, s": ("functions", N_FUNCTIONS, measure_table, ""),
    "memory of the autoscalers, bytes": ("functions", N_FUNCTIONS, autoscaler_bytes, ""),
    "load reports added up, s": ("routers", N_ROUTERS, measure_reports, ""),
    "fair queue, one request, 1 tenant active, s": (
        "tenants",
        N_TENANTS,
        lambda n: measure_queue(n, n_active=1),
        "",
    ),
    "fair queue, one request, all tenants active, s": (
        "tenants",
        N_TENANTS,
        lambda n: measure_queue(n, n_active=n),
        "",
    ),
}


def measure(*, largest: int, models: Sequence[int] = (), cache: Path = CACHE) -> dict[str, Any]:
    """Return the content of growth.json.

    Args:
        largest: largest number of functions, routers or tenants.
        models: numbers of models.
        cache: folder of generated models.
    """
    machine = describe_machine()
    rows: dict[str, Any] = {}
    with frozen_objects():
        for name, (unit, sizes, function, reason) in ROWS.items():
            values = {size: function(size) for size in sizes if size <= largest}
            rows[name] = make_row(unit, values, reason)
            print(f"  {name}: exponent {_format_exponent(rows[name])}", flush=True)
    if models:
        for name, by_models in rows_of(measure_models(models, cache=cache)).items():
            rows[name] = make_row("models", by_models, "")
    return {"machine": machine, "rows": rows}


def make_row(unit: str, values: Mapping[int, float], reason: str) -> dict[str, Any]:
    """Return one row; growth that is worse than linear has its reason."""
    slope = exponent(values) if len(values) > 1 else None
    row: dict[str, Any] = {"of": unit, "values": dict(values), "exponent": slope}
    if slope is not None and slope > EXPLAINED_EXPONENT:
        row["reason"] = reason or "not explained"
    return row


def format_growth(figures: Mapping[str, Any]) -> str:
    """Return the rows as a table."""
    return format_table(
        ("", "OF", "SIZES AND VALUES", "EXPONENT"),
        [
            (
                name,
                row["of"],
                ", ".join(f"{size}: {value:.3g}" for size, value in row["values"].items()),
                _format_exponent(row),
            )
            for name, row in figures["rows"].items()
        ],
    )


def _format_exponent(row: Mapping[str, Any]) -> str:
    return "–" if row["exponent"] is None else f"{row['exponent']:.2f}"


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="Measure how time and memory grow with functions, routers, tenants and models.",
    )
    parser.add_argument(
        "--models",
        type=_numbers,
        default=N_MODELS,
        metavar="N,N",
        help="numbers of models of a real `faasmoe up`; 0 for none (default: 1,20,200)",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of generated models")
    parser.add_argument("--largest", type=int, default=10_000, help="largest size to measure")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of growth.json")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    figures = measure(largest=arguments.largest, models=arguments.models, cache=arguments.cache)
    print(f"\n{format_growth(figures)}")
    print(f"figures: {write_figures('growth', figures, folder=out)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return 0
    from benchmarks.evaluation.plots import growth_plot

    for suffix, image in growth_plot(figures["rows"]).items():
        path = out / f"growth.{suffix}"
        path.write_bytes(image)
        print(f"plot: {path}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = (-1,)
    if numbers[0] < 0 or (numbers[0] == 0 and len(numbers) > 1):
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers from 1, or 0 for none")
    return numbers if numbers[0] else ()


if __name__ == "__main__":
    sys.exit(main())
