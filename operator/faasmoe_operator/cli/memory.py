"""Sizes as people read them."""

from __future__ import annotations


def format_bytes(size_bytes: float | None) -> str:
    """Return a size as people read it, in units of 1024."""
    if size_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
