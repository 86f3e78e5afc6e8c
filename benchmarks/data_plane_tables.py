"""Text tables of `benchmarks.data_plane`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.alternating_runs import PairedRuns
from benchmarks.baseline_tuning import BestSettings
from benchmarks.decoding import DecodeRun
from benchmarks.report import Spread
from benchmarks.resource_usage import MemoryUsage

from faasmoe_operator.cli.formatting import format_table

MIB = 1 << 20


def decoding_table(runs: Mapping[int, PairedRuns], settings: BestSettings) -> str:
    """Return the comparison as medians, with minimum and maximum in parentheses."""
    header = ("", *(f"BATCH {batch}" for batch in runs))
    rows: list[tuple[str, ...]] = [("in-process experts", *settings.implementations.values())]
    for name in ("tokens_per_s", "step_ms", "cpu_ms_per_token"):
        label = {"tokens_per_s": "tokens/s", "step_ms": "ms/step"}.get(name, "CPU ms/token")
        for side in ("in_process", "ours"):
            cells = (_cell(getattr(t, side), name) for t in runs.values())
            rows.append((f"{label}, {side.replace('_', '-')}", *cells))
    rows += [
        ("decode ratio, ours/in-process", *(t.decode_ratio.format(3) for t in runs.values())),
        ("CPU ratio, ours/in-process", *(t.cpu_ratio.format(3) for t in runs.values())),
        ("calls per token", *(f"{t.calls_per_token:.2f}" for t in runs.values())),
        ("equal first tokens", *(f"{t.equal_first_tokens:.1%}" for t in runs.values())),
        ("tokens before first difference", *(f"{t.equal_tokens:.1%}" for t in runs.values())),
        ("same, among in-process", *(f"{settings.self_agreement(b):.1%}" for b in runs)),
    ]
    return format_table(header, rows)


def memory_table(
    ours: Mapping[str, MemoryUsage], in_process: MemoryUsage, *, floor_bytes: int
) -> str:
    """Return the PSS of each process and their sum."""
    header = ("PROCESS", "PSS MiB", "ANONYMOUS", "FILES")
    rows = [_memory_row(name, usage) for name, usage in ours.items()]
    total = MemoryUsage.sum_of(ours.values())
    rows += [
        _memory_row("ours, total", total),
        _memory_row("in-process", in_process),
        ("weights", f"{floor_bytes / MIB:.1f}", "", ""),
    ]
    over = f"relative to the weights: ours {total.total / floor_bytes:.3f}"
    return f"{format_table(header, rows)}\n{over}, in-process {in_process.total / floor_bytes:.3f}"


def profile_table(parts: Mapping[int, Mapping[str, float]]) -> str:
    """Return the breakdown of a step in ms; the last rows are totals."""
    header = ("MS PER STEP", *(f"BATCH {batch}" for batch in parts))
    names = next(iter(parts.values()))
    rows = [(name, *(f"{breakdown[name]:.2f}" for breakdown in parts.values())) for name in names]
    return format_table(header, rows)


def _cell(runs: Sequence[DecodeRun], name: str) -> str:
    return Spread.from_values([getattr(run, name) for run in runs]).format(1)


def _memory_row(name: str, usage: MemoryUsage) -> tuple[str, ...]:
    sizes = (usage.total, usage.anonymous, usage.of_files)
    return (name, *(f"{size / MIB:.1f}" for size in sizes))
