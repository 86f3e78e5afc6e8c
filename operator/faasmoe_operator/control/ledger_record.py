"""The ledger as text, by which it outlives a control core: JSON, each account a row. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from faasmoe_operator.control.ledger import FIELDS, Ledger, Use

VERSION = 1
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `decode` raises for a text that is no ledger."""


def encode(ledger: Ledger, *, max_chars: int) -> str:
    """Return a ledger as text.

    Args:
        ledger: the ledger.
        max_chars: of books beyond this, those that were told longest ago are left out.
    """
    n_left_out = 0
    while len(text := _text(ledger, n_left_out)) > max_chars and n_left_out < len(ledger.books):
        n_left_out = max(n_left_out + 1, math.ceil(len(ledger.books) * (1 - max_chars / len(text))))
    return text


def decode(text: str) -> Ledger:
    """Return a ledger; raises DAMAGED."""
    value = json.loads(text)
    if (value["version"], tuple(value["fields"])) != (VERSION, FIELDS):
        raise ValueError(f"version: got {value['version']!r}, expected {VERSION}")
    books = {str(name): _uses(told) for name, told in value["books"].items()}
    since_s = _number(value["since_s"])
    return Ledger(since_s, accounts=_uses(value["accounts"]), books=books)


def _text(ledger: Ledger, n_left_out: int) -> str:
    books = islice(ledger.books.items(), n_left_out, None)
    value = {
        "version": VERSION,
        "since_s": ledger.since_s,
        "fields": FIELDS,
        "accounts": _rows(ledger.accounts),
        "books": {name: _rows(told) for name, told in books},
    }
    return json.dumps(value, separators=(",", ":"))


def _rows(uses: Mapping[str, Use]) -> dict[str, tuple[float, ...]]:
    return {name: use.numbers for name, use in uses.items()}


def _uses(rows: Any) -> dict[str, Use]:
    return {str(name): _use(row) for name, row in rows.items()}


def _use(row: Any) -> Use:
    if not isinstance(row, list) or len(row) != len(FIELDS):
        raise TypeError(f"accounts: got {row!r}, expected {len(FIELDS)} numbers")
    return Use(**{name: _number(number) for name, number in zip(FIELDS, row, strict=True)})


def _number(value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"accounts: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"accounts: got {value!r}, expected numbers of 0 or more")
    return value
