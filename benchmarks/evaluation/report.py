"""`faasmoe bench report`: table, plots and page, written again from figures that were kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evaluation import sweep_table, table
from benchmarks.evaluation.page import page
from benchmarks.report import write_figures

NEEDS_MATPLOTLIB = "plots and page need matplotlib: pip install 'faasmoe[bench]'"


def add_command(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report",
        help="write table, plots and page again",
        description="Write the Markdown table, the plots and the HTML page of a JSON file that a "
        "benchmark has written.",
    )
    parser.add_argument("file", type=Path, help="such as benchmarks/out/paper.json")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write them beside the file."""
    results = json.loads(arguments.file.read_text(encoding="utf-8"))
    render(arguments.file.stem, results, folder=arguments.file.parent)
    return 0


def write(name: str, results: Mapping[str, Any], *, folder: Path) -> None:
    """Write the figures, then everything that is made of them; print the table."""
    path = write_figures(name, results, folder=folder)
    render(name, results, folder=folder)
    print(f"\nfigures: {path}", flush=True)


def render(name: str, results: Mapping[str, Any], *, folder: Path) -> None:
    """Write NAME.md, NAME-PLOT.png and NAME.html into a folder; print the table."""
    is_sweep = "sizes" in results
    text = sweep_table.markdown(results) if is_sweep else table.markdown(results)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}", flush=True)
    try:
        from benchmarks.evaluation import plots
    except ImportError:
        print(NEEDS_MATPLOTLIB, flush=True)
        return
    images = plots.sweep_plots(results) if is_sweep else plots.comparison_plots(results)
    for part, image in images.items():
        (folder / f"{name}-{part}.png").write_bytes(image)
    (folder / f"{name}.html").write_text(page(f"FaaSMoE: {name}", text, images), encoding="utf-8")
