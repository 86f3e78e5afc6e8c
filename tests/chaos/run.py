"""A chaos run: a workload with known responses under a schedule of faults, and its report."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.faults import FaultInjector
from tests.chaos.schedule import Fault
from tests.chaos.stack import MODEL_NAME, ChaosStack, running_chaos_stack
from tests.chaos.tenants import new_tenants
from tests.chaos.workload import CheckedWorkload, TokenStall

AFTER_KILL_S = 3.0  # a stall within this time after a kill is attributed to it


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """The parameters of a run.

    Attributes:
        seed: seed of the schedule.
        duration_s: duration of the workload under faults.
        faults: the schedule.
        model: the checkpoint.
        store: its store.
        experts: experts of one layer per function.
        capacity: functions per sandbox.
        replicated_layers: layers whose functions have two replicas, such as 0-3.
        requests_per_tenant: concurrent requests of each tenant.
        kills_only_s: duration of the initial phase with kills of sandboxes only. Before it, the
            workload runs undisturbed for as long. In both, all sandboxes are on the router's
            machine, as with `faasmoe up`; afterwards, every second new one seems not to be.
        router_fields: further fields of `spec.router`.
    """

    seed: int
    duration_s: float
    faults: Sequence[Fault]
    model: Path
    store: Path
    experts: int
    capacity: int
    replicated_layers: str
    requests_per_tenant: int = 1
    kills_only_s: float = 0.0
    router_fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """An injected fault.

    Attributes:
        fault: the fault of the schedule.
        at_s: time of the injection (monotonic clock).
        target: what it was injected into; empty if there was no target.
    """

    fault: Fault
    at_s: float
    target: str


async def run_chaos(plan: ChaosPlan, folder: Path) -> dict[str, Any]:
    """Perform a run and return its report.

    Args:
        plan: the parameters.
        folder: folder for store copy, keys and logs.
    """
    load_before = os.getloadavg()[0]
    async with running_chaos_stack(
        plan.model,
        plan.store,
        tenants=new_tenants(),
        experts=plan.experts,
        capacity=plan.capacity,
        replicated_layers=plan.replicated_layers,
        router_fields=plan.router_fields,
        folder=folder,
        has_remote=not plan.kills_only_s,
    ) as stack:
        workload = CheckedWorkload(stack.url, MODEL_NAME, stack.tenants)
        ambiguous = await workload.record_expected()
        before, accounts = await stack.total_metrics(), await _completed_requests(stack)
        stop = asyncio.Event()
        workload_task = asyncio.create_task(workload.run(stop, per_tenant=plan.requests_per_tenant))
        try:
            injected = await _inject_faults(stack, plan)
        finally:
            stop.set()
            await workload_task
        after, accounts_after = await stack.total_metrics(), await _completed_requests(stack)
        recovered = await _has_recovered(workload, stack)
    counts = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        **_figures(workload, injected, counts, kills_only_s=plan.kills_only_s),
        "answers_by_tenant": dict(workload.outcome.completed),
        "accounted_by_tenant": {name: n - accounts[name] for name, n in accounts_after.items()},
        "seed": plan.seed,
        "duration_s": plan.duration_s,
        "kills_alone_s": plan.kills_only_s,
        "recovered": recovered,
        "questions_without_a_sure_answer": ambiguous,
        "schedule": [fault.to_json() for fault in plan.faults],
        "load_1min_before": load_before,
        "load_1min_after": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "machine": platform.platform(),
    }


async def _completed_requests(stack: ChaosStack) -> dict[str, int]:
    return {tenant.name: await stack.completed_requests(tenant) for tenant in stack.tenants}


async def _inject_faults(stack: ChaosStack, plan: ChaosPlan) -> list[InjectedFault]:
    await asyncio.sleep(plan.kills_only_s)  # undisturbed, to compare with
    injector, started_s, injected = FaultInjector(stack), time.monotonic(), []
    try:
        for fault in plan.faults:
            stack.proxy.has_remote = fault.at_s >= plan.kills_only_s
            await asyncio.sleep(max(0.0, started_s + fault.at_s - time.monotonic()))
            target = await injector.inject(fault)
            injected.append(InjectedFault(fault, time.monotonic(), target))
        await asyncio.sleep(max(0.0, started_s + plan.duration_s - time.monotonic()))
    finally:
        await injector.close()
    return injected


async def _has_recovered(workload: CheckedWorkload, stack: ChaosStack) -> bool:
    """Return whether functions serve all requests correctly again within a minute."""
    end_s = time.monotonic() + 60.0
    while time.monotonic() < end_s:
        before = await stack.router_metrics()
        probe = CheckedWorkload(stack.url, MODEL_NAME, stack.tenants)
        await probe.record_expected()
        after = await stack.router_metrics()
        if after["local_computations_total"] == before["local_computations_total"]:
            return all(probe.expected.get(q) == text for q, text in workload.expected.items())
        await asyncio.sleep(1.0)
    return False


def _figures(
    workload: CheckedWorkload,
    injected: Sequence[InjectedFault],
    counts: dict[str, float],
    *,
    kills_only_s: float,
) -> dict[str, Any]:
    outcome = workload.outcome
    stalls_s = sorted(stall.took_s for stall in outcome.stalls)
    kinds = Counter(i.fault.kind.value for i in injected if i.target)
    by_kind = {
        kind: round(
            _longest_stall(outcome.stalls, [i for i in injected if i.fault.kind.value == kind]), 4
        )
        for kind in kinds
    }
    kills_only = [i for i in injected if i.target and i.fault.at_s < kills_only_s]
    after_kill_s = _longest_stall(outcome.stalls, kills_only)
    ordinary_s = _stalls_before(outcome.stalls, injected)
    return {
        "requests": outcome.requests,
        "failed": len(outcome.failures),
        "wrong": len(outcome.wrong_responses),
        "stall_max_s": round(after_kill_s, 4),
        "kills_alone": len(kills_only),
        "ordinary_gap_p50_s": _percentile(ordinary_s, 50),
        "ordinary_gap_p99_s": _percentile(ordinary_s, 99),
        "ordinary_gap_max_s": _percentile(ordinary_s, 100),
        "stall_beyond_ordinary_s": round(after_kill_s - _percentile(ordinary_s, 100), 4),
        "stall_p50_s": _percentile(stalls_s, 50),
        "stall_p99_s": _percentile(stalls_s, 99),
        "stall_longest_s": _percentile(stalls_s, 100),
        "stall_max_s_by_fault": by_kind,
        "first_token_p50_s": _percentile(sorted(outcome.first_tokens_s), 50),
        "first_token_max_s": _percentile(sorted(outcome.first_tokens_s), 100),
        "faults": sum(kinds.values()),
        "faults_by_kind": dict(kinds),
        "calls": counts["function_calls_total"],
        "retries": counts["function_call_retries_total"],
        "hedges": counts["function_call_hedges_total"],
        "failed_calls": counts["function_call_failures_total"],
        "local_computations": counts["local_computations_total"],
        "hot_computations": counts["colocated_computations_total"],
        "mailbox_calls": counts["mailbox_calls_total"],
        "failures": outcome.failures[:20],
        "wrong_answers": outcome.wrong_responses[:20],
        "definitions": {
            "stall_max_s": "longest time between two tokens of a stream within "
            f"{AFTER_KILL_S:g} s after a sandbox was killed, in the phase with kills only "
            "(the first kills_alone_s)",
            "ordinary_gap_max_s": "the same before the first fault, undisturbed, for as long as "
            "the phase with kills only; likewise at the median (p50) and p99",
            "stall_beyond_ordinary_s": "stall_max_s less ordinary_gap_max_s: what the kills added "
            "to the longest gap",
            "stall_max_s_by_fault": "the same after each kind of fault, over the whole run",
            "stall_longest_s": "longest time between two tokens of a stream in the whole run",
        },
    }


def _stalls_before(
    stalls: Sequence[TokenStall], injected: Sequence[InjectedFault]
) -> Sequence[float]:
    """Return the times between tokens before the first fault, ascending."""
    first_s = min((i.at_s for i in injected), default=math.inf)
    return sorted(s.took_s for s in stalls if s.begun_s + s.took_s < first_s)


def _longest_stall(stalls: Sequence[TokenStall], injected: Sequence[InjectedFault]) -> float:
    return max(
        (
            s.took_s
            for i in injected
            for s in stalls
            if s.begun_s < i.at_s + AFTER_KILL_S and s.begun_s + s.took_s > i.at_s
        ),
        default=0.0,
    )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 4)
