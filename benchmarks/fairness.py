"""One tenant floods and five do not: what these wait, and what each gets.

`python -m benchmarks.fairness [--quick]`. A real router over real sandboxes, six tenants of equal
weight with a key each, plain HTTP. Four loads, one after another, in rounds:

- alone: each of the five quiet tenants has one request going, with pauses;
- flood: the same, and the sixth keeps 50 times its share of the slots outstanding;
- fifo: the same again, but all six call with one key, so that one line is all there is;
- backlog: the sixth as before, and each of the others keeps more outstanding than its share, so
  that all always wait; Jain's index is of the priced tokens that each got.

`quiet_p99_ratio` is the quiet tenants' p99 under flood over their p99 alone.
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
BACKLOG_OUTSTANDING = (
    4  # outstanding requests of a tenant that always waits: more than its share of the slots
)
PAUSE_S = 0.05
MAX_MODEL_LEN = 128

Figures = dict[str, Any]
LoadResults = dict[str, TenantResult]


@dataclass(frozen=True, slots=True)
class FairnessPlan:
    """How much is measured.

    Attributes:
        geometry: of the model.
        slots: sequences computed at once.
        rounds: of all loads.
        answers: quiet tenants' answers, of all of them together, that end a load.
        fifo_answers: the same where they wait behind the flood.
        backlog_answers: all tenants' answers that end the last load.
    """

    geometry: CheckpointGeometry
    slots: int
    rounds: int
    answers: int
    fifo_answers: int
    backlog_answers: int

    @property
    def flood_outstanding(self) -> int:
        """Requests that the flood keeps going: 50 times its share of the slots."""
        return round(FLOOD_OVER_SHARE * self.slots / (len(QUIET_TENANTS) + 1))


def full_plan(rounds: int) -> FairnessPlan:
    """Return the plan whose figures count: a model whose steps take some milliseconds."""
    geometry = CheckpointGeometry(4, 2048, 512, 8, 16, 4, 704, 1024)
    return FairnessPlan(geometry, 6, rounds, answers=60, fifo_answers=15, backlog_answers=120)


def quick_plan() -> FairnessPlan:
    """Return a plan of seconds, which shows that everything works; its figures mean little."""
    return FairnessPlan(
        small_geometry(), 6, rounds=1, answers=20, fifo_answers=5, backlog_answers=30
    )


def build_loads(plan: FairnessPlan) -> Mapping[str, LoadPattern]:
    """Return the loads of a round, in their order."""
    quiet = [TenantTraffic(name, 1, pause_s=PAUSE_S) for name in QUIET_TENANTS]
    flood = TenantTraffic(FLOODING_TENANT, plan.flood_outstanding)
    one_key = api_key(FLOODING_TENANT)
    all_tenants = [*quiet, flood]
    single_queue = [
        TenantTraffic(c.name, c.outstanding, c.pause_s, key=one_key) for c in all_tenants
    ]
    backlog = [*(TenantTraffic(name, BACKLOG_OUTSTANDING) for name in QUIET_TENANTS), flood]
    return {
        "alone": LoadPattern(quiet, QUIET_TENANTS, plan.answers),
        "flood": LoadPattern(all_tenants, QUIET_TENANTS, plan.answers),
        "fifo": LoadPattern(single_queue, QUIET_TENANTS, plan.fifo_answers),
        "backlog": LoadPattern(backlog, (*QUIET_TENANTS, FLOODING_TENANT), plan.backlog_answers),
    }


async def measure(plan: FairnessPlan, folder: Path) -> Figures:
    """Run all rounds; return what is written to fairness.json."""
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
    found: dict[str, list[LoadResults]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as temporary:
        router = running_tenant_router(
            moemodel,
            Path(temporary),
            tenants=(*QUIET_TENANTS, FLOODING_TENANT),
            max_num_seqs=plan.slots,
        )
        async with router as url:
            await run_load(url, build_loads(plan)["alone"], seed=-1)  # warm
            for number in range(plan.rounds):
                for name, load in build_loads(plan).items():
                    print(f"round {number + 1} of {plan.rounds}: {name}", flush=True)
                    served = await run_load(url, load, seed=number)
                    found[name].append(served)
    return {"machine": machine, "plan": asdict(plan), **build_figures(found)}


def build_figures(found: Mapping[str, Sequence[LoadResults]]) -> Figures:
    """Return the figures of all rounds together."""
    latencies = {
        name: [
            s for served in rounds for tenant in QUIET_TENANTS for s in served[tenant].latencies_s
        ]
        for name, rounds in found.items()
    }
    p99 = {name: percentile(values, 99) for name, values in latencies.items()}
    costs = {
        name: sum(served[name].cost for served in found["backlog"])
        for name in (*QUIET_TENANTS, FLOODING_TENANT)
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
            name: sum(len(s.latencies_s) for served in rounds for s in served.values())
            for name, rounds in found.items()
        },
        "refused": sum(s.rejected for rounds in found.values() for f in rounds for s in f.values()),
    }


def format_results(found: Figures) -> str:
    """Return the tables."""
    rows = [
        (
            name,
            *(f"{found[key][name]:.3f}" for key in ("quiet_p50_s", "quiet_p99_s")),
            *(str(found[key][name]) for key in ("quiet_requests", "throughput_requests")),
        )
        for name in found["quiet_p99_s"]
    ]
    head = ("LOAD", "QUIET P50 S", "QUIET P99 S", "QUIET REQUESTS", "ALL REQUESTS")
    keys = ("quiet_p99_ratio", "fifo_quiet_p99_ratio", "jain", "refused")
    ratios = [(key, f"{found[key]:.3f}") for key in keys]
    return f"{format_table(head, rows)}\n\n{format_table(('', 'MEASURED'), ratios)}"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all work?")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each load (%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="models (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="figures (%(default)s)")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else full_plan(arguments.rounds)
    found = asyncio.run(measure(plan, arguments.cache.resolve()))
    print(f"\n{format_results(found)}")
    written = write_figures("fairness", found, folder=arguments.out.resolve())
    print(f"\nfigures: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
