"""A MoEModel file: YAML text to a checked MoEModel, every fault named with its place."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.spec.moemodel import MoEModel
from faasmoe_operator.spec.problems import describe

MAX_FILE_BYTES = 1 << 20


def load_moemodel(path: Path) -> MoEModel:
    """Read and check a MoEModel file; raises MoEModelError."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise MoEModelError(
                str(path), [f"got {size_bytes} bytes, expected at most {MAX_FILE_BYTES}"]
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoEModelError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise MoEModelError(str(path), [f"not UTF-8 (byte {error.start})"]) from error
    return parse_moemodel(text, name=str(path))


def parse_moemodel(text: str, *, name: str) -> MoEModel:
    """Check the text of a MoEModel file; raises MoEModelError.

    Args:
        text: one YAML document.
        name: what the error calls the text.
    """
    value = _read_yaml(text, name)
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise MoEModelError(name, [f"document: got {kind}, expected a mapping"])
    try:
        return MoEModel.model_validate(value)
    except ValidationError as error:
        raise MoEModelError(name, describe(error, MoEModel)) from error


def _read_yaml(text: str, name: str) -> Any:
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise MoEModelError(name, [f"{line}{error.problem or 'not YAML'}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MoEModelError(name, [f"not YAML ({str(error).splitlines()[0]})"]) from error
    if len(documents) > 1:
        raise MoEModelError(name, [f"got {len(documents)} documents, expected one"])
    return documents[0] if documents else None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

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
