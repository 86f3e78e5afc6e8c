"""Weaker versions of a tool's JSON schema, for keywords that a grammar cannot enforce.

A model may call a tool whose schema has such keywords; the tool itself checks its arguments. Only
tools with `strict: true` are held to the whole schema.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# Keywords that may hold what no grammar can express, such as a pattern with lookahead.
_TEXT_KEYWORDS = frozenset({"pattern", "patternProperties", "format", "propertyNames"})
# Keywords whose value maps names, which may look like keywords, to schemas.
_SCHEMA_MAPS = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})


def weaker_schemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield schemas that accept at least what a schema accepts, the strictest first."""
    yield schema
    yield _without_text_keywords(schema)
    yield {"type": "object"}


def _without_text_keywords(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_text_keywords(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: {name: _without_text_keywords(part) for name, part in value.items()}
        if key in _SCHEMA_MAPS and isinstance(value, Mapping)
        else value
        if key in ("enum", "const", "default", "examples")
        else _without_text_keywords(value)
        for key, value in schema.items()
        if key not in _TEXT_KEYWORDS
    }
