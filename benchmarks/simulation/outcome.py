"""What a simulated run came to: the figures of a strategy, their table and their prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import percentile
from benchmarks.simulation.engine import ServedRequest
from benchmarks.simulation.system import Run
from benchmarks.simulation.traffic import PricesSpec

from faasmoe_operator.cli.formatting import format_table

PERCENTILES = (50, 99)
ROWS = (
    ("requests served", "served", "{:,.0f}"),
    ("requests refused", "refused", "{:,.0f}"),
    ("requests unfinished", "unfinished", "{:,.0f}"),
    ("moved from a lost router", "moved", "{:,.0f}"),
    ("time to first token p50, s", "ttft_p50_s", "{:.3f}"),
    ("time to first token p99, s", "ttft_p99_s", "{:.3f}"),
    ("time per token p50, s", "tpot_p50_s", "{:.4f}"),
    ("cold starts", "cold_starts", "{:,.0f}"),
    ("cold start p50, s", "cold_start_p50_s", "{:.3f}"),
    ("cold start p99, s", "cold_start_p99_s", "{:.3f}"),
    ("queued for a slot p50, s", "queued_p50_s", "{:.3f}"),
    ("queued for a slot p99, s", "queued_p99_s", "{:.3f}"),
    ("memory, mean GB", "mean_gb", "{:,.1f}"),
    ("memory, highest GB", "max_gb", "{:,.1f}"),
    ("GB-seconds", "gb_seconds", "{:,.0f}"),
    ("GB-seconds per token", "gb_seconds_per_token", "{:.3f}"),
    ("reserved, mean GB", "mean_reserved_gb", "{:,.1f}"),
    ("nodes, mean", "mean_nodes", "{:.2f}"),
    ("nodes needed", "max_nodes", "{:,.0f}"),
    ("node hours", "node_hours", "{:,.1f}"),
    ("cost", "cost", "{:,.2f}"),
)


def summarize(run: Run, prices: PricesSpec) -> dict[str, Any]:
    """Return the figures of a run; a percentile of nothing is None."""
    served = [one for one in run.requests if one.finished_s >= 0]
    refused = [one for one in run.requests if one.refusal]
    tokens = sum(one.n_done for one in served)
    node_hours, gb_hours = run.node_seconds / 3600, run.gb_seconds / 3600
    cold = [one.cold_start_s for one in run.requests if one.cold_start_s > 0]
    ttfts = [one.first_token_s - one.request.arrival_s + run.request_s for one in served]
    return {
        "requests": len(run.requests),
        "served": len(served),
        "refused": len(refused),
        "refusals": dict(Counter(one.refusal for one in refused)),
        "unfinished": len(run.requests) - len(served) - len(refused),
        "moved": sum(one.n_moved > 0 for one in run.requests),
        "tokens": tokens,
        "cold_starts": len(cold),
        **_percentiles("ttft", ttfts),
        **_percentiles("tpot", [_tpot_s(one) for one in served if one.n_done > 1]),
        **_percentiles("cold_start", cold),
        **_percentiles("queued", [max(0.0, one.started_s - one.admitted_s) for one in served]),
        "mean_gb": run.gb_seconds / run.duration_s,
        "max_gb": run.max_gb,
        "gb_seconds": run.gb_seconds,
        "gb_seconds_per_token": run.gb_seconds / tokens if tokens else None,
        "mean_reserved_gb": run.reserved_gb_seconds / run.duration_s,
        "mean_nodes": run.node_seconds / run.duration_s,
        "max_nodes": run.max_nodes,
        "node_hours": node_hours,
        "replica_hours": run.replica_seconds / 3600,
        "cost": node_hours * prices.node_hour + gb_hours * prices.gigabyte_hour,
    }


def format_outcomes(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one column for each strategy; without prices it has no cost."""
    names = list(outcomes)
    rows = [
        (label, *(_format(outcomes[name][key], form) for name in names))
        for label, key, form in ROWS
        if any(outcomes[name][key] for name in names) or key in ("served", "refused")
    ]
    return format_table(("", *(name.upper() for name in names)), rows)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _tpot_s(one: ServedRequest) -> float:
    return (one.finished_s - one.first_token_s) / (one.n_done - 1)


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_p{percent}_s": percentile(values, percent) if values else None
        for percent in PERCENTILES
    }
