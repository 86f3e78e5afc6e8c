"""One frame of `faasmoe top`: the control's status as text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_operator.cli.memory import format_bytes
from faasmoe_operator.cli.table import format_table

FUNCTION_HEADER = (
    "FUNCTION",
    "LAYERS",
    "EXPERTS",
    "STATE",
    "REPLICAS",
    "LOAD",
    "CALLS",
    "ROWS",
    "IDLE",
    "WEIGHTS",
    "MEMORY",
)


def draw(status: Mapping[str, Any], *, max_lines: int) -> str:
    """Return a frame: totals, then the functions that were used most.

    Args:
        status: what GET /v1/status says.
        max_lines: functions at most.
    """
    functions = sorted(status["functions"], key=lambda f: (-f["rows"], -f["ready"]))
    memory = _memory_by_function(status["sandboxes"])
    rows = [_row(function, memory.get(function["id"])) for function in functions[:max_lines]]
    left = len(functions) - len(rows)
    lines = [*_totals(status), "", format_table(FUNCTION_HEADER, rows)]
    return "\n".join(lines + ([f"and {left} functions more"] if left else []))


def _totals(status: Mapping[str, Any]) -> list[str]:
    functions, sandboxes, pool = status["functions"], status["sandboxes"], status["pool"]
    weights = sum(f["size_bytes"] for f in functions if f["ready"] > 0)
    memory = sum(sandbox["pss_bytes"] or 0 for sandbox in sandboxes)
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(status["decisions"].items()))
    return [
        f"{status['model']}: {len(functions)} functions ({_counts(functions)}), "
        f"{sum(f['ready'] for f in functions)} replicas, {format_bytes(weights)} of weights up",
        f"sandboxes: {len(sandboxes)} ({_counts(sandboxes)}), {format_bytes(memory)}; "
        f"generic: {pool['ready']}, pool of {pool['size']}",
        f"routers: {status['followers']}; held calls and requests: {status['held']}; "
        f"decisions: {reasons or 'none'}",
    ]


def _counts(entries: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(entry["state"] for entry in entries)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _memory_by_function(sandboxes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each function's share of its sandboxes' memory."""
    memory: dict[str, float] = {}
    for sandbox in sandboxes:
        for function in sandbox["functions"]:
            share = (sandbox["pss_bytes"] or 0) / len(sandbox["functions"])
            memory[function] = memory.get(function, 0.0) + share
    return memory


def _row(function: Mapping[str, Any], memory_bytes: float | None) -> tuple[str, ...]:
    load, idle_s = function["concurrency"], function["idle_s"]
    layers = function["layers"]
    return (
        function["id"][:12],
        str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
        str(function["n_experts"]),
        function["state"],
        f"{function['ready']}/{function['desired']}",
        "-" if load is None else f"{load:.2f}",
        str(function["calls"]),
        str(function["rows"]),
        "-" if idle_s is None else f"{idle_s:.0f} s",
        format_bytes(function["size_bytes"]),
        format_bytes(memory_bytes),
    )
