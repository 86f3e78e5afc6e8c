"""Reads the YAML documents of a file strictly; knows no kind of object."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from faasmoe_operator.errors import MoEModelError

MAX_FILE_BYTES = 1 << 20


def read_text(path: Path) -> str:
    """Return the text of a file; raises MoEModelError if it is too large, missing or no UTF-8."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise MoEModelError(
                str(path), [f"got {size_bytes} bytes, expected at most {MAX_FILE_BYTES}"]
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoEModelError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise MoEModelError(str(path), [f"not UTF-8 (byte {error.start})"]) from error


def parse_documents(text: str, *, name: str) -> list[Any]:
    """Return the values of all documents of a text; raises MoEModelError.

    Args:
        text: YAML.
        name: name of the text in error messages.
    """
    try:
        return list(yaml.load_all(text, Loader=_UniqueKeyLoader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise MoEModelError(name, [f"{line}{error.problem or 'not YAML'}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MoEModelError(name, [f"not YAML ({str(error).splitlines()[0]})"]) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)
