"""Where a checkpoint comes from: a folder, or a model hub's repository at one commit.

Ends in a local folder, the list of its safetensors files and a fingerprint; reads no tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from faasmoe_router.checkpoint.errors import PrepareError, SourceNotFound, SourceUnsupported
from faasmoe_router.checkpoint.hub import download
from faasmoe_router.checkpoint.index import read_json, weight_names

_COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
_WEIGHT_INDEX_SUFFIX = ".index.json"
_LARGEST_COMPANION_BYTES = 256 << 20
_QUANTISATION_FIELDS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint in a local folder.

    Attributes:
        name: as the user wrote it.
        revision: the hub's commit; None for a folder.
        folder: where it lies.
        weight_files: its safetensors files.
        config: its config.json.
    """

    name: str
    revision: str | None
    folder: Path
    weight_files: tuple[Path, ...]
    config: Mapping[str, Any]

    def fingerprint(self, *, dtype: str | None) -> str:
        """Return what tells this checkpoint, prepared as `dtype`, from another or a changed one."""
        facts = {
            "dtype": dtype,
            "config": self.config,
            "revision": self.revision,
            "files": [self._facts(path) for path in self.weight_files],
            "companions": [self._facts(path) for path in self.companions()],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def companions(self) -> list[Path]:
        """Return the files beside the weights that go into a store."""
        paths = {path for pattern in _COMPANIONS for path in self.folder.glob(pattern)}
        return [path for path in sorted(paths) if _is_companion(path)]

    def _facts(self, path: Path) -> list[str | int]:
        stat = path.stat()
        # A commit pins the bytes; a folder's files can be written anew with the same size.
        name = str(path.relative_to(self.folder))
        return [name, stat.st_size, stat.st_mtime_ns if self.revision is None else 0]


def resolve_source(name: str, *, revision: str | None) -> Source:
    """Return the checkpoint called `name`: a folder, file:///folder, hf://org/name or org/name.

    Raises:
        PrepareError: it is not there, is no safetensors checkpoint, or is quantised.
    """
    folder, commit = _locate(name, revision=revision)
    config = read_json(folder / "config.json")
    for holder, fields in (("", config), ("text_config.", config.get("text_config"))):
        for field in _QUANTISATION_FIELDS:
            if isinstance(fields, dict) and fields.get(field):
                given = fields[field]
                method = given.get("quant_method") if isinstance(given, dict) else given
                raise SourceUnsupported(
                    f"{folder / 'config.json'}: {holder}{field}: got quant_method {method!r}, "
                    "expected no quantisation: give the checkpoint in bfloat16, float16 or float32"
                )
    return Source(name, commit, folder, _weight_files(folder), config)


def is_hub(name: str) -> bool:
    """Tell whether a source is a hub's: hf://org/name, or org/name without such a folder."""
    parts = urlsplit(name)
    if parts.scheme:
        return parts.scheme == "hf"
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_id and not Path(name).is_dir()


def _locate(name: str, *, revision: str | None) -> tuple[Path, str | None]:
    parts = urlsplit(name)
    if parts.scheme == "hf":
        return download(f"{parts.netloc}{parts.path}", revision=revision)
    if parts.scheme and parts.scheme != "file":
        raise SourceUnsupported(
            f"source: got {name!r}, expected a folder, file:///FOLDER, hf://ORG/NAME or ORG/NAME"
        )
    folder = Path(unquote(parts.path)) if parts.scheme == "file" else Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise PrepareError(f"revision: got {revision!r}, expected none for the folder {folder}")
        return folder, None
    if is_hub(name):
        return download(name, revision=revision)
    raise SourceNotFound(f"source: got {name!r}, expected a folder that exists or ORG/NAME")


def _is_companion(path: Path) -> bool:
    if path.name.endswith(_WEIGHT_INDEX_SUFFIX) or not path.is_file():
        return False
    return path.stat().st_size <= _LARGEST_COMPANION_BYTES


def _weight_files(folder: Path) -> tuple[Path, ...]:
    files = tuple(folder / name for name in weight_names(folder))
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise SourceNotFound(
            f"{folder}: got no file {', '.join(missing)}, expected safetensors files"
        )
    return files
