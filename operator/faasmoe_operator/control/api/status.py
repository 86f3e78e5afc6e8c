"""The control's state as JSON, for `faasmoe top`; and its gauges."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import Member
from faasmoe_operator.platforms.memory import pss_bytes


async def describe(controller: Controller) -> dict[str, Any]:
    """Return the whole state."""
    now = controller.clock()
    feed = controller.feed
    members = list(controller.fleet.members)
    pids = [member.sandbox.pid for member in members]
    memory = await asyncio.to_thread(lambda: [pid and pss_bytes(pid) for pid in pids])
    return {
        "model": controller.model.name,
        "epoch": feed.epoch,
        "version": feed.version,
        "followers": feed.n_followers,
        "functions": _functions(controller, now=now),
        "sandboxes": [_sandbox(m, size) for m, size in zip(members, memory, strict=True)],
        "pool": {"size": controller.model.warm_pool, "ready": controller.fleet.n_generic()},
        "held": controller.reports.held(now),
        "decisions": _decisions(controller),
    }


def update_gauges(controller: Controller) -> None:
    """Set the gauges to the present state."""
    metrics, scalers = controller.metrics, controller.scalers
    phases = Counter(scalers.phase(name).value for name in controller.model.functions)
    sandboxes = controller.fleet.states()
    metrics.functions.clear()
    for phase, count in phases.items():
        metrics.functions.labels(phase).set(count)
    metrics.sandboxes.clear()
    for state, count in sandboxes.items():
        metrics.sandboxes.labels(state.value).set(count)
    metrics.held.set(controller.reports.held(controller.clock()))
    metrics.streams.set(controller.feed.n_followers)
    metrics.tasks.set(len(asyncio.all_tasks()))


def _functions(controller: Controller, *, now: float) -> list[dict[str, Any]]:
    ready, records, scalers = controller.fleet.ready(), controller.records, controller.scalers
    return [
        {
            "id": name,
            "layers": list(function.spec.layers),
            "n_experts": len(function.spec.experts),
            "size_bytes": function.size_bytes,
            "state": scalers.phase(name).value,
            "desired": scalers.desired(name),
            "ready": ready.get(name, 0),
            "concurrency": scalers.concurrency(name, now=now),
            "idle_s": records.idle_s(name, now=now),
            "calls": records.calls[name],
            "rows": records.rows[name],
        }
        for name, function in controller.model.functions.items()
    ]


def _sandbox(member: Member, size_bytes: int | None) -> dict[str, Any]:
    return {
        "id": member.sandbox.id,
        "address": member.sandbox.address,
        "pid": member.sandbox.pid,
        "state": member.state.value,
        "ready": member.sandbox.ready,
        "functions": list(member.functions),
        "pss_bytes": size_bytes,
    }


def _decisions(controller: Controller) -> dict[str, int]:
    samples = (s for m in controller.metrics.decisions.collect() for s in m.samples)
    return {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}
