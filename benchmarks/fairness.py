"""Fairness between tenants: latency of five quiet tenants while a sixth floods the router.

`python -m benchmarks.fairness [--quick]`. A real router with real sandboxes serves six tenants of
equal weight over HTTP. Each round applies four loads in turn:

- alone: each of the five quiet tenants has one outstanding request, with pauses;
- flood: in addition, the sixth tenant keeps 50 times its share of the slots outstanding;
- fifo: as flood, but all six use the same key and so share one queue;
- backlog: every tenant keeps more requests outstanding than its share, so that all queues are
  always filled; Jain's index is computed over the token cost that each tenant received.

`quiet_p99_ratio` is the p99 latency of the quiet tenants under flood divided by that under alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.geometry import CheckpointGeometry, small_geometry
from benchmarks.report import OUT, describe_machine, percentile, write_figures
from benchmarks.static_deployment import make_model_in_subprocess, write_moemodel
from benchmarks.tenant_load import LoadPattern, TenantResult, TenantTraffic, jain_index, run_load
from benchmarks.tenant_router import api_key, running_tenant_router

from faasmoe_operator.cli.formatting import format_table

CACHE = Path.home() / ".cache" / "faasmoe-bench"
QUIET_TENANTS = tuple(f"quiet-{number}" for number in range(1, 6))
FLOODING_TENANT = "flood"
FLOOD_OVER_SHARE = 50
BACKLOG_OUTSTANDING = 4  # requests per tenant; more than its share, so that its queue never empties
PAUSE_S = 0.05
MAX_MODEL_LEN = 128

Figures = dict[str, Any]
LoadResults = dict[str, TenantResult]


@dataclass(frozen=True, slots=True)
class FairnessPlan:
    """The extent of the benchmark.

    Attributes:
        geometry: sizes of the model.
        slots: maximum number of running sequences.
        rounds: rounds of all four loads.
        answers: responses to the quiet tenants, in total, after which alone and flood end.
        fifo_answers: the same for fifo, in which they wait behind the flood.
        backlog_answers: responses to all tenants after which backlog ends.
    """

    geometry: CheckpointGeometry
    slots: int
    rounds: int
    answers: int
    fifo_answers: int
    backlog_answers: int

    @property
    def flood_outstanding(self) -> int:
        """Outstanding requests of the flooding tenant: 50 times its share of the slots."""
        return round(FLOOD_OVER_SHARE * self.slots / (len(QUIET_TENANTS) + 1))


def full_plan(rounds: int) -> FairnessPlan:
    """Return the plan whose figures are published; a step of its model takes milliseconds."""
    geometry = CheckpointGeometry(4, 2048, 512, 8, 16, 4, 704, 1024)
    return FairnessPlan(geometry, 6, rounds, answers=60, fifo_answers=15, backlog_answers=120)


def quick_plan() -> FairnessPlan:
    """Return a smoke test that takes seconds; its figures mean little."""
    return FairnessPlan(
        small_geometry(), 6, rounds=1, answers=20, fifo_answers=5, backlog_answers=30
    )


def build_loads(plan: FairnessPlan) -> Mapping[str, LoadPattern]:
    """Return the loads of a round in order, by name."""
    quiet = [TenantTraffic(name, 1, pause_s=PAUSE_S) for name in QUIET_TENANTS]
    flood = TenantTraffic(FLOODING_TENANT, plan.flood_outstanding)
    shared_key = api_key(FLOODING_TENANT)
    all_tenants = [*quiet, flood]
    single_queue = [
        TenantTraffic(t.name, t.outstanding, t.pause_s, key=shared_key) for t in all_tenants
    ]
    backlog = [*(TenantTraffic(name, BACKLOG_OUTSTANDING) for name in QUIET_TENANTS), flood]
    return {
        "alone": LoadPattern(quiet, QUIET_TENANTS, plan.answers),
        "flood": LoadPattern(all_tenants, QUIET_TENANTS, plan.answers),
        "fifo": LoadPattern(single_queue, QUIET_TENANTS, plan.fifo_answers),
        "backlog": LoadPattern(backlog, (*QUIET_TENANTS, FLOODING_TENANT), plan.backlog_answers),
    }


async def measure(plan: FairnessPlan, folder: Path) -> Figures:
    """Run all rounds; return the content of fairness.json."""
    machine = describe_machine()
    checkpoint, store = await make_model_in_subprocess(plan.geometry, folder)
    moemodel = store.with_name(f"{store.name}-fairness.yaml")
    write_moemodel(
        moemodel,
        checkpoint=checkpoint,
        store=store,
        experts_per_function=plan.geometry.experts,
        max_model_len=MAX_MODEL_LEN,
        experts={"functionsPerSandbox": plan.geometry.layers},
    )
    results: dict[str, list[LoadResults]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as temporary:
        router = running_tenant_router(
            moemodel,
            Path(temporary),
            tenants=(*QUIET_TENANTS, FLOODING_TENANT),
            max_num_seqs=plan.slots,
        )
        async with router as url:
            await run_load(url, build_loads(plan)["alone"], seed=-1)  # warm-up
            for number in range(plan.rounds):
                for name, load in build_loads(plan).items():
                    print(f"round {number + 1} of {plan.rounds}: {name}", flush=True)
                    results[name].append(await run_load(url, load, seed=number))
    return {"machine": machine, "plan": asdict(plan), **build_figures(results)}


def build_figures(results: Mapping[str, Sequence[LoadResults]]) -> Figures:
    """Aggregate the rounds of each load into JSON figures."""
    latencies = {
        name: [
            latency_s
            for by_tenant in rounds
            for tenant in QUIET_TENANTS
            for latency_s in by_tenant[tenant].latencies_s
        ]
        for name, rounds in results.items()
    }
    p99 = {name: percentile(values, 99) for name, values in latencies.items()}
    costs = {
        tenant: sum(by_tenant[tenant].cost for by_tenant in results["backlog"])
        for tenant in (*QUIET_TENANTS, FLOODING_TENANT)
    }
    return {
        "quiet_p99_ratio": p99["flood"] / p99["alone"],
        "fifo_quiet_p99_ratio": p99["fifo"] / p99["alone"],
        "jain": jain_index(list(costs.values())),
        "quiet_p99_s": p99,
        "quiet_p50_s": {name: percentile(values, 50) for name, values in latencies.items()},
        "quiet_requests": {name: len(values) for name, values in latencies.items()},
        "backlog_cost": costs,
        "throughput_requests": {
            name: sum(len(r.latencies_s) for by_tenant in rounds for r in by_tenant.values())
            for name, rounds in results.items()
        },
        "refused": sum(
            result.rejected
            for rounds in results.values()
            for by_tenant in rounds
            for result in by_tenant.values()
        ),
    }


def format_results(figures: Figures) -> str:
    """Return the latency table and the table of headline figures."""
    rows = [
        (
            name,
            *(f"{figures[key][name]:.3f}" for key in ("quiet_p50_s", "quiet_p99_s")),
            *(str(figures[key][name]) for key in ("quiet_requests", "throughput_requests")),
        )
        for name in figures["quiet_p99_s"]
    ]
    header = ("LOAD", "QUIET P50 S", "QUIET P99 S", "QUIET REQUESTS", "ALL REQUESTS")
    keys = ("quiet_p99_ratio", "fifo_quiet_p99_ratio", "jain", "refused")
    ratios = [(key, f"{figures[key]:.3f}") for key in keys]
    return f"{format_table(header, rows)}\n\n{format_table(('', 'MEASURED'), ratios)}"


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness",
        description="Measure the latency of quiet tenants while another tenant floods the router.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smoke test with a tiny model")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each load")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of generated models")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else full_plan(arguments.rounds)
    figures = asyncio.run(measure(plan, arguments.cache.resolve()))
    print(f"\n{format_results(figures)}")
    path = write_figures("fairness", figures, folder=arguments.out.resolve())
    print(f"\nfigures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
