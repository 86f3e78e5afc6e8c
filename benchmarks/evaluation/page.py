"""One HTML page that holds everything: tables, and plots inside it. Pure."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8884; padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: white }
:root { color-scheme: light dark }
"""


def page(title: str, markdown: str, plots: Mapping[str, bytes]) -> str:
    """Return a page that needs no other file.

    Args:
        title: of the page.
        markdown: lists and tables, as table.py writes them; nothing else of Markdown is known.
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
        f"<body><h1>{html.escape(title)}</h1>\n{_body(markdown)}{images}</body></html>\n"
    )


def _body(markdown: str) -> str:
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.strip()]
    return "".join(_table(b) if b[0].startswith("|") else _list(b) for b in blocks)


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lines)
    return f"<ul>{items}</ul>\n"


def _table(lines: Sequence[str]) -> str:
    head, _, *rows = ([html.escape(cell) for cell in _cells(line)] for line in lines)
    body = "".join(f"<tr>{_row('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{_row('th', head)}</tr></thead><tbody>{body}</tbody></table>\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _row(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
