"""Popularity as text, by which it outlives a control core: JSON, by the functions' shapes. Pure.

It is no secret and no treasure: one that is damaged or of another model is as good as none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from faasmoe_operator.control.popularity import HALF_LIFE_S

VERSION = 1
DAMAGED = (ValueError, KeyError, TypeError, RecursionError)
"""What `decode` raises for a text that cannot be used."""


def encode(rows: Mapping[str, float], *, model_digest: str, now_s: float) -> str:
    """Return counts as text.

    Args:
        rows: the counts.
        model_digest: digest of the model's store.
        now_s: the time of day, as runs are compared by it.
    """
    value = {
        "version": VERSION,
        "model_digest": model_digest,
        "written_at_s": round(now_s, 3),
        "rows": {shape: round(count, 3) for shape, count in rows.items()},
    }
    return json.dumps(value)


def decode(text: str, *, model_digest: str, now_s: float) -> dict[str, float]:
    """Return the counts as they are now, nothing if they are another model's; raises DAMAGED."""
    value = json.loads(text)
    if (value["version"], value["model_digest"]) != (VERSION, model_digest):
        return {}
    rows, written_at_s = value["rows"], value["written_at_s"]
    if not isinstance(rows, dict) or not isinstance(written_at_s, int | float):
        raise TypeError("rows: expected an object; written_at_s: expected a number")
    factor = 0.5 ** (max(0.0, now_s - written_at_s) / HALF_LIFE_S)
    return {str(shape): _count(count) * factor for shape, count in rows.items()}


def _count(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"rows: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"rows: got {value!r}, expected numbers of 0 or more")
    return float(value)
