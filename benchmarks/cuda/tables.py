"""Tables of the GPU benchmark, and the division of a step into gate, dispatch, wire and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.decoding import DecodeRun
from benchmarks.report import Spread
from benchmarks.step_breakdown import breakdown_ms

from faasmoe_operator.cli.formatting import format_table

WHOLE = "whole step"
WAITING, SENDING = "waiting for sandboxes", "sending and receiving"
EXPERTS = "experts, of the waiting"
ROUTER_PARTS = (
    "attention, gates, shared experts, head, batching",
    "waiting for the router's device",
)


def tokens_per_s(runs: Sequence[DecodeRun]) -> float:
    """Return the median throughput of several runs."""
    return median(run.tokens_per_s for run in runs)


def format_runs(runs: Sequence[DecodeRun]) -> str:
    """Return the figures of a system at one batch size as a line."""
    step_ms, ttft_s = median(r.step_ms for r in runs), median(r.ttft_s for r in runs)
    rate = f"{tokens_per_s(runs):.0f} tokens/s"
    return f"{rate}, TPOT {step_ms:.1f} ms, TTFT {ttft_s * 1e3:.0f} ms"


def describe(runs: Sequence[DecodeRun]) -> dict[str, Any]:
    """Return the JSON figures of a system at one batch size."""
    return {
        "tokens_per_s": Spread.from_values([run.tokens_per_s for run in runs]),
        "tpot_ms": Spread.from_values([run.step_ms for run in runs]),
        "ttft_ms": Spread.from_values([run.ttft_s * 1e3 for run in runs]),
        "cpu_ms_per_token": Spread.from_values([run.cpu_ms_per_token for run in runs]),
        "steps": runs[0].steps,
    }


def step_parts_ms(long: DecodeRun, short: DecodeRun, *, extra_steps: int) -> dict[str, float]:
    """Return the parts of a decode step in ms.

    The compute time of experts is only known for whole runs, prefill included. The difference
    between two runs with the same prompts gives that of decode steps alone.

    Args:
        long: a profiled run.
        short: a profiled run with fewer tokens.
        extra_steps: how many more steps the long run has.
    """
    extra_s = long.counters["experts_of_run"] - short.counters["experts_of_run"]
    return {**breakdown_ms(long), EXPERTS: max(0.0, extra_s) / extra_steps * 1e3}


def step_shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Return the fractions of a step's time for gate, dispatch, wire and experts; they sum to 1.

    "gate" is everything that the router's model computes, attention included.
    """
    experts = min(parts[EXPERTS], parts[WAITING])
    spent = {
        "gate": sum(parts[name] for name in ROUTER_PARTS),
        "wire": parts[SENDING] + parts[WAITING] - experts,
        "experts": experts,
    }
    spent["dispatch"] = parts[WHOLE] - sum(spent.values())
    return {name: ms / parts[WHOLE] for name, ms in spent.items()}


def throughput_table(
    runs: Mapping[str, Mapping[int, Sequence[DecodeRun]]], *, baseline: str
) -> str:
    """Return the figures of all systems and their throughput relative to a baseline."""
    header = ("SYSTEM", "BATCH", "TOKENS/S", "VS IN-PROCESS", "TPOT MS", "TTFT MS")
    rows = []
    for name, by_batch in runs.items():
        for batch, batch_runs in sorted(by_batch.items()):
            base = runs.get(baseline, {}).get(batch)
            ratio = "" if base is None else f"{tokens_per_s(batch_runs) / tokens_per_s(base):.2f}"
            step_ms = Spread.from_values([run.step_ms for run in batch_runs]).format(2)
            ttft_ms = Spread.from_values([run.ttft_s * 1e3 for run in batch_runs]).format(0)
            rate = f"{tokens_per_s(batch_runs):.0f}"
            rows.append((name, str(batch), rate, ratio, step_ms, ttft_ms))
    return format_table(header, rows)


def profile_table(name: str, parts: Mapping[int, Mapping[str, float]]) -> str:
    """Return the breakdown of a system's step in ms and as shares."""
    batches = sorted(parts)
    header = (f"MS PER STEP, {name}", *(f"BATCH {batch}" for batch in batches))
    names = next(iter(parts.values()))
    rows = [(part, *(f"{parts[b][part]:.2f}" for b in batches)) for part in names]
    shares = {batch: step_shares(parts[batch]) for batch in batches}
    rows += [
        (f"share of {part}", *(f"{shares[b][part]:.1%}" for b in batches))
        for part in ("gate", "dispatch", "wire", "experts")
    ]
    return format_table(header, rows)


def transport_table(transports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the round-trip times of rows between two processes in µs.

    Args:
        transports: a spread by transport and size in bytes; the key "failed" has a reason instead.
    """
    sizes = sorted({int(size) for by in transports.values() for size in by if size.isdigit()})
    header = ("US PER ROUND TRIP", *(f"{size // 1024} KIB" for size in sizes))
    rows = []
    for name, by_size in transports.items():
        cells = [by_size.get(str(size)) for size in sizes]
        medians = ["" if cell is None else f"{cell['median']:.0f}" for cell in cells]
        if why_none := by_size.get("failed"):
            medians[medians.index("") if "" in medians else -1] = f"failed: {why_none}"
        rows.append((name, *medians))
    return format_table(header, rows)
