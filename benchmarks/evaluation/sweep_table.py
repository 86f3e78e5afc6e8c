"""Markdown report of a sweep over function sizes, with a recommended size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evaluation.strategies import FUNCTIONS_SHARED
from benchmarks.evaluation.table import describe_setup, markdown_table, strategies

TOLERANCE = 1.05
COSTS = ("tpot_p50_s", "cpu_s_per_token", "mean_gb")
COLUMNS = (
    ("tokens_per_s", "tokens/s", 1.0, 1),
    ("ttft_p50_s", "first token p50, s", 1.0, 3),
    ("tpot_p50_s", "per token p50, ms", 1e3, 1),
    ("tpot_p99_s", "per token p99, ms", 1e3, 1),
    ("cpu_s_per_token", "CPU ms per token", 1e3, 1),
    ("cpu_percent", "CPU %", 1.0, 0),
    ("mean_gb", "memory, GB", 1.0, 3),
    ("calls_per_token", "calls per token", 1.0, 2),
    ("wire_bytes_per_token", "KB per token", 1e-3, 1),
    ("failures", "failed", 1.0, 0),
)


def markdown(sweep: Mapping[str, Any]) -> str:
    """Return setup, one table per strategy, and the recommendation."""
    sizes = sorted(sweep["sizes"], key=int)
    header = ["experts per function", *(label for _, label, _, _ in COLUMNS)]
    parts = [describe_setup(sweep["about"])]
    for name in strategies(sweep["sizes"][sizes[0]]):
        rows = [[size, *_cells(sweep["sizes"][size][name])] for size in sizes]
        title = sweep["sizes"][sizes[0]][name]["title"]
        parts.append(f"- {title}")
        parts.append(markdown_table(header, rows))
    parts.append(
        f"- recommended: {recommended_size(sweep)} experts per function, the smallest size whose "
        f"time per token, CPU per token and memory are within {TOLERANCE - 1:.0%} of the best, or "
        "else the size with the smallest product of the three"
    )
    return "\n\n".join(parts)


def recommended_size(sweep: Mapping[str, Any]) -> int:
    """Return the recommended number of experts per function.

    Small functions scale at a finer granularity, so the smallest size wins whose costs are all
    within TOLERANCE of the best. If there is none, the smallest product of all costs decides.
    """
    by_size = {int(size): by_name[FUNCTIONS_SHARED] for size, by_name in sweep["sizes"].items()}
    best = {cost: min(figures[cost] for figures in by_size.values()) for cost in COSTS}
    good = [
        size
        for size, figures in by_size.items()
        if all(figures[cost] <= TOLERANCE * best[cost] for cost in COSTS)
    ]
    return min(good) if good else min(by_size, key=lambda size: _product(by_size[size]))


def _product(figures: Mapping[str, float]) -> float:
    product = 1.0
    for cost in COSTS:
        product *= figures[cost]
    return product


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [f"{factor * figures[key]:.{digits}f}" for key, _, factor, digits in COLUMNS]
