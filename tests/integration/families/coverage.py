"""Reads from the installed transformers which families its experts interface covers."""

import re
from functools import cache
from pathlib import Path

import transformers

_DECORATED = re.compile(
    r"^@use_experts_implementation(?:\(.*\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE
)


@cache
def covered_families() -> dict[str, tuple[str, ...]]:
    """Maps each family's package to the experts classes that its modelling code decorates."""
    found: dict[str, tuple[str, ...]] = {}
    for source in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        classes = tuple(_DECORATED.findall(source.read_text(encoding="utf-8")))
        if classes:
            found[source.parent.name] = classes
    return found
