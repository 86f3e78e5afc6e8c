"""Tables of the comparison with other servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.comparison import OURS, PEER, Cell, Visits, cell_figures
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


DAY_SERVERS = {OURS: "zero", PEER: "llama.cpp"}
"""Names in day.json."""


def overview_table(visits: Visits, day: Mapping[str, Any] | None) -> str:
    """Return what a reader wants first: idle and loaded speed, memory warm and at rest.

    Args:
        visits: the visits.
        day: the content of day.json; None without one. Its model may be another one.
    """
    rows = [_overview_row(cell, runs, day) for cell, runs in visits.items()]
    low, high = _extremes(visits)
    header = (
        "MODEL",
        "PRECISION",
        "SERVER",
        f"TOK/S AT {low}",
        f"AT {high}",
        f"LONG TTFT ms AT {low}",
        f"AT {high}",
        "MiB WARM",
        "AT REST",
        "GB S/TOKEN OF A DAY" + ("" if day is None else f" ({day['model']['name']})"),
    )
    return format_table(header, rows)


def _overview_row(
    cell: Cell, runs: Sequence[Visit], day: Mapping[str, Any] | None
) -> tuple[str, ...]:
    figures = cell_figures(runs)
    batches = figures["batches"]
    ends = [batches[str(c)] for c in (min(map(int, batches)), max(map(int, batches)))]
    speeds = [_format(end["tokens_per_s"], 1) for end in ends]
    ttfts = [_format(end["ttft_ms"], 0) if "ttft_ms" in end else "" for end in ends]
    rest = figures["rest_pss_mib"]
    memory = (_format(figures["pss_mib"], 0), "" if rest is None else _format(rest, 0))
    return (cell.model, cell.precision, cell.server, *speeds, *ttfts, *memory, _of_day(cell, day))


def _of_day(cell: Cell, day: Mapping[str, Any] | None) -> str:
    name = DAY_SERVERS.get(cell.server)
    if day is None or name not in day["servers"]:
        return ""
    values = [run["gb_s_per_token"] for run in day["servers"][name]]
    known = [value for value in values if value is not None]
    return _format(Spread.from_values(known), 3) if known else ""


def _extremes(visits: Visits) -> tuple[int, int]:
    numbers = {c for runs in visits.values() for c in runs[0].batches}
    return min(numbers), max(numbers)


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
