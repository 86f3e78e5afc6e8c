"""`faasmoe bench report`, and the Markdown, PNG, SVG and HTML files of every benchmark.

All of them derive from the JSON figures, so a report can be rendered again without measuring. The
HTML page embeds its plots and needs no other file.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation import sweep_table, table
from benchmarks.report import write_figures

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8884; padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: white }
:root { color-scheme: light dark }
"""


def render_html_page(title: str, markdown: str, plots: Mapping[str, bytes]) -> str:
    """Return a self-contained HTML page.

    Args:
        title: title of the page.
        markdown: lists and tables as written by table.py; no other Markdown is supported.
        plots: PNG images by name.
    """
    images = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">\n'
        for name, image in plots.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{_render_markdown(markdown)}{images}</body></html>\n"
    )


def _render_markdown(markdown: str) -> str:
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.strip()]
    return "".join(_render_table(b) if b[0].startswith("|") else _render_list(b) for b in blocks)


def _render_list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lines)
    return f"<ul>{items}</ul>\n"


def _render_table(lines: Sequence[str]) -> str:
    header, _, *rows = ([html.escape(cell) for cell in _cells(line)] for line in lines)
    body = "".join(f"<tr>{_render_row('td', row)}</tr>" for row in rows)
    return (
        f"<table><thead><tr>{_render_row('th', header)}</tr></thead><tbody>{body}</tbody></table>\n"
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _render_row(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)


NEEDS_MATPLOTLIB = "plots and page need matplotlib: pip install 'faasmoe[bench]'"


def add_command(commands: Any) -> None:
    """Add `faasmoe bench report`."""
    parser = commands.add_parser(
        "report",
        help="render a report from existing figures",
        description="Render the Markdown table, the plots and the HTML page from the JSON figures\n"
        "of an earlier benchmark. The files are written next to the figures.",
        epilog="Example:\n  faasmoe bench report benchmarks/out/paper.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="JSON figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Render the report next to its figures."""
    results = json.loads(arguments.file.read_text(encoding="utf-8"))
    render(arguments.file.stem, results, folder=arguments.file.parent)
    return 0


def write(name: str, results: Mapping[str, Any], *, folder: Path) -> None:
    """Write NAME.json and render the report."""
    path = write_figures(name, results, folder=folder)
    render(name, results, folder=folder)
    print(f"\nfigures: {path}", flush=True)


def render(name: str, results: Mapping[str, Any], *, folder: Path) -> None:
    """Print the table and write NAME.md, NAME-PLOT.png, NAME-PLOT.svg and NAME.html to a folder.

    Without matplotlib, plots and HTML page are skipped.
    """
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
    for plot, formats in images.items():
        for suffix, image in formats.items():
            (folder / f"{name}-{plot}.{suffix}").write_bytes(image)
    pngs = {plot: formats["png"] for plot, formats in images.items()}
    page = render_html_page(f"FaaSMoE: {name}", text, pngs)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
