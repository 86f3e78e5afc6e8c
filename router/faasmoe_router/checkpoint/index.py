"""Which safetensors files a checkpoint consists of, by its index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from faasmoe_router.checkpoint.errors import PrepareError, SourceNotFound

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def weight_names(folder: Path) -> list[str]:
    """Return the names of the files that the index names, or of the single file.

    Raises:
        PrepareError: the index is no JSON, or names no files.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return [SINGLE_NAME]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PrepareError(f"{index}: weight_map: got {weight_map!r}, expected tensor names")
    wrong = next((name for name in weight_map.values() if not isinstance(name, str)), None)
    if wrong is not None:
        raise PrepareError(f"{index}: weight_map: got {wrong!r}, expected the name of a file")
    return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises PrepareError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceNotFound(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PrepareError(f"{path}: got no JSON: {error}") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value
