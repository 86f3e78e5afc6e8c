"""The files beside the weights: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from faasmoe_router.checkpoint.source import Source, read_json

_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates/*.jinja"
_WEIGHT_INDEX = ".index.json"
_LARGEST_BYTES = 256 << 20


def companion_files(source: Source, *, dtype: str | None) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of `model/`; config.json speaks of `dtype` if given."""
    paths = {path for pattern in (*_PATTERNS, _TEMPLATES) for path in source.folder.glob(pattern)}
    for path in sorted(paths):
        if path.name.endswith(_WEIGHT_INDEX) or not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_BYTES:
            continue
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
