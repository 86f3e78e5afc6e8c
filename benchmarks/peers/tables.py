"""Tables of the comparison with other servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.comparison import Cell, Visits, cell_figures
from benchmarks.peers.visit import Visit
from benchmarks.report import Spread

from faasmoe_operator.cli.formatting import format_table

_COLUMNS = (
    ("TOK/S", "tokens_per_s", 1),
    ("TTFT ms", "short_ttft_ms", 0),
    ("LONG TTFT ms", "ttft_ms", 0),
    ("TPOT ms", "tpot_ms", 1),
    ("CPU ms/TOKEN", "cpu_ms_per_token", 1),
)
_VISIT_COLUMNS = (
    ("START s", "start_s", 1),
    ("MiB", "pss_mib", 0),
    ("OTHER CORES", "other_cores", 2),
)


def server_table(visits: Visits) -> str:
    """Return one row per server, model, precision and concurrency."""
    header = (
        "MODEL",
        "PRECISION",
        "SERVER",
        "BATCH",
        *(c[0] for c in _COLUMNS),
        "START s",
        "MiB",
        "OTHER CORES",
    )
    return format_table(header, [row for c, runs in visits.items() for row in _rows(c, runs)])


def _rows(cell: Cell, runs: Sequence[Visit]) -> list[tuple[str, ...]]:
    figures = cell_figures(runs)
    rows = []
    for batch, values in figures["batches"].items():
        measured = [
            _format(values[name], digits) if name in values else "" for _, name, digits in _COLUMNS
        ]
        ends = [_format(figures[name], digits) for _, name, digits in _VISIT_COLUMNS]
        rows.append((cell.model, cell.precision, cell.server, batch, *measured, *ends))
    return rows


def ratio_table(figures: dict[str, Any]) -> str:
    """Return one row per ratio, precision and concurrency."""
    rows = [
        (key, precision, batch, _format(spread, 2))
        for key, precisions in figures["spread"].items()
        for precision, batches in precisions.items()
        for batch, spread in batches.items()
    ]
    return format_table(("OURS OVER THEIRS", "PRECISION", "BATCH", "MEASURED"), rows)


def _format(spread: Spread, digits: int) -> str:
    """Return median and extremes; the value alone if there is only one."""
    if spread.low == spread.high:
        return f"{spread.median:.{digits}f}"
    return spread.format(digits)
