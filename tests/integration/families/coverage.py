"""Finds the families that the experts interface of the installed transformers covers."""

import re
from functools import cache
from pathlib import Path

import transformers

_DECORATED = re.compile(
    r"^@use_experts_implementation(?:\(.*\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE
)


@cache
def covered_families() -> dict[str, tuple[str, ...]]:
    """Return the decorated experts classes by package of the family."""
    families: dict[str, tuple[str, ...]] = {}
    for source in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        classes = tuple(_DECORATED.findall(source.read_text(encoding="utf-8")))
        if classes:
            families[source.parent.name] = classes
    return families
