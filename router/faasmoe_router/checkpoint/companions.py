"""The files beside the weights: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from faasmoe_router.checkpoint.index import read_json
from faasmoe_router.checkpoint.source import Source


def companion_files(source: Source, *, dtype: str | None) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of `model/`; config.json speaks of `dtype` if given."""
    for path in source.companions():
        name = f"model/{path.relative_to(source.folder)}"
        if path.name == "config.json" and dtype is not None:
            yield name, _config_as(path, dtype)
        else:
            yield name, path.read_bytes()


def _config_as(path: Path, dtype: str) -> bytes:
    config = read_json(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for field in ("dtype", "torch_dtype"):
            if field in part:
                part[field] = dtype
    config["dtype"] = dtype
    return (json.dumps(config, indent=2) + "\n").encode()
