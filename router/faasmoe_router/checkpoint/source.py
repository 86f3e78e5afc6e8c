"""Checkpoint sources: a local folder, a repository of the Hugging Face hub, or an object store.

A source is resolved to a local folder, downloading it if necessary, its safetensors files, its
auxiliary files (configuration, tokenizer, chat template, licence) and a fingerprint that tells
whether a store was made of it. No tensor is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.formats.settings import (
    QUANTIZATION_FILES,
    QuantizationSettings,
    read_settings,
    without_settings,
)
from faasmoe_router.checkpoint.hub import (
    HUB_SCHEME,
    HubName,
    download_files,
    exact_pattern,
    hub_errors,
)
from faasmoe_router.checkpoint.object_store import (
    ObjectFolder,
    content_hash,
    is_object_url,
    locked_download_dir,
)
from faasmoe_router.errors import PrepareError, SourceNotFound, SourceUnsupported

WEIGHT_INDEX_NAME = "model.safetensors.index.json"
SINGLE_WEIGHT_FILE_NAME = "model.safetensors"
_PICKLE_PATTERNS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
MAX_NAMES_SHOWN = 3
_WEIGHT_INDEX_SUFFIX = ".index.json"
_AUXILIARY_PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
_MAX_AUXILIARY_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20  # of a config or index; that of a model with 100,000 tensors has 10 MB
_METADATA_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint in a local folder.

    Attributes:
        name: the source as the user wrote it.
        revision: the commit of the hub repository, or a hash of an object store's listing; None for
            a local folder.
        folder: the local folder that holds the files.
        weight_files: its safetensors files.
        config: the content of its config.json.
        published: how its weights are quantised; None if they are not.
    """

    name: str
    revision: str | None
    folder: Path
    weight_files: tuple[Path, ...]
    config: Mapping[str, Any]
    published: QuantizationSettings | None = None

    def fingerprint(
        self,
        *,
        dtype: str | None,
        quantization: QuantizationEntry = QuantizationEntry(),  # noqa: B008
    ) -> str:
        """Return a hash that changes if the checkpoint's files or an argument change."""
        identity: dict[str, Any] = {
            "dtype": dtype,
            "config": self.config,
            "revision": self.revision,
            "files": [self._file_identity(path) for path in self.weight_files],
            "companions": [self._file_identity(path) for path in self.auxiliary_files()],
        }
        if quantization:  # the hash of a store without does not change
            identity["quantization"] = quantization.to_json()
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def auxiliary_files(self) -> list[Path]:
        """Return the files other than weights that a store contains."""
        paths = {path for pattern in _AUXILIARY_PATTERNS for path in self.folder.glob(pattern)}
        return [path for path in sorted(paths) if _is_auxiliary_file(path)]

    def _file_identity(self, path: Path) -> list[str | int]:
        stat = path.stat()
        # A commit pins the content; a local file may be rewritten with the same size.
        is_inside = path.is_relative_to(self.folder)  # a GGUF file is not
        name = str(path.relative_to(self.folder)) if is_inside else path.name
        return [name, stat.st_size, stat.st_mtime_ns if self.revision is None else 0]


def resolve_source(name: str, *, revision: str | None) -> CheckpointSource:
    """Resolve a source, downloading it if it is a hub repository.

    Args:
        name: a folder, file:///FOLDER, hf://ORG/NAME or ORG/NAME, s3://, gs:// or https://.
        revision: branch, tag or commit of the hub repository; None for the default branch.

    Raises:
        PrepareError: it does not exist or is not a safetensors checkpoint.
    """
    folder, commit = _resolve_folder(name, revision=revision)
    config = read_json(folder / "config.json")
    quantization = read_settings(folder, config)
    return CheckpointSource(name, commit, folder, _weight_files(folder), config, quantization)


def _resolve_folder(name: str, *, revision: str | None) -> tuple[Path, str | None]:
    parts = urlsplit(name)
    if is_object_url(name):
        if revision is not None:
            raise PrepareError(f"revision: got {revision!r}, expected none for {name!r}")
        return download_objects(name)
    if parts.scheme and parts.scheme not in (HUB_SCHEME, "file") and "://" in name:
        raise SourceUnsupported(
            f"source: got {name!r}, expected a folder, file:///FOLDER, hf://ORG/NAME, ORG/NAME, "
            "s3://BUCKET/PATH, gs://BUCKET/PATH or https://HOST/PATH"
        )
    if (hub_name := HubName.of(name)) is not None:
        return download_checkpoint(hub_name.repository, revision=revision)
    folder = Path(unquote(parts.path)) if parts.scheme == "file" else Path(name).expanduser()
    if not folder.is_dir():
        raise SourceNotFound(f"source: got {name!r}, expected a folder that exists or ORG/NAME")
    if revision is not None:
        raise PrepareError(f"revision: got {revision!r}, expected none for the folder {folder}")
    return folder, None


def download_checkpoint(repository: str, *, revision: str | None) -> tuple[Path, str]:
    """Download a hub repository's config, tokenizer and safetensors files, unless cached.

    Returns:
        The local folder and the commit.

    Raises:
        PrepareError: the repository or revision is not accessible; the message says why.
    """
    with hub_errors(repository, revision):
        folder = download_files(repository, revision, _METADATA_PATTERNS)
        commit = folder.name  # the hub's cache names a snapshot's folder after its commit
        if not (folder / "config.json").exists():
            raise SourceUnsupported(
                f"source: got {repository!r}, which has no config.json and no GGUF file, expected "
                "a Hugging Face checkpoint"
            )
        download_files(repository, commit, map(exact_pattern, weight_file_names(folder)))
    return folder, commit


def download_objects(source: str) -> tuple[Path, str]:
    """Download a checkpoint from an object store or a web server, unless it is there.

    Returns:
        The local folder, and a hash of what was found.

    Raises:
        PrepareError: it cannot be read, or is no checkpoint; the message says why.
    """
    remote = ObjectFolder(source)
    files = remote.metadata_files(_METADATA_PATTERNS)
    if not any(file.name == "config.json" for file in files):
        raise SourceNotFound(
            f"source: got {source!r}, which has no config.json, expected a Hugging Face checkpoint"
        )
    with locked_download_dir(source) as folder:
        for file in files:
            remote.download(file, folder)
        weights = remote.files(weight_file_names(folder))
        for file in weights:
            remote.download(file, folder)
    return folder, content_hash([*files, *weights])


def _weight_files(folder: Path) -> tuple[Path, ...]:
    files = tuple(folder / name for name in weight_file_names(folder))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise SourceNotFound(_missing_weights(folder, missing))
    return files


def _missing_weights(folder: Path, missing: Sequence[str]) -> str:
    """Return an error that says which weight files are there, and what to do."""
    pickles = _names(folder, *_PICKLE_PATTERNS)
    present = _names(folder, "*.safetensors")
    index = folder / WEIGHT_INDEX_NAME
    if index.exists() and present:
        remedy = (
            f"; {index.name} is stale or the download is incomplete: download the checkpoint again"
        )
        if SINGLE_WEIGHT_FILE_NAME in present:
            remedy += f", or delete {index.name} if {SINGLE_WEIGHT_FILE_NAME} holds all weights"
        return (
            f"{folder}: {index.name} names {_quoted(missing)}, got only {_quoted(present)}{remedy}"
        )
    if present:
        return (
            f"{folder}: got {_quoted(present)} without {index.name}, expected the index beside "
            f"several files, or one file {SINGLE_WEIGHT_FILE_NAME}: download the index too, or "
            "save the model again with `save_pretrained`"
        )
    if pickles:
        return (
            f"{folder}: got {_quoted(pickles)}, expected safetensors files: weights in PyTorch's "
            "pickle format are not read, as reading them may run code; convert them with "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)`"
        )
    return f"{folder}: got no file {_quoted(missing)}, expected safetensors files"


def _names(folder: Path, *patterns: str) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return (
        shown
        if len(names) <= MAX_NAMES_SHOWN
        else f"{shown} and {len(names) - MAX_NAMES_SHOWN} more"
    )


def weight_file_names(folder: Path) -> list[str]:
    """Return the names of the weight files: those in the index, or the single file without one.

    Raises:
        PrepareError: the index is not valid JSON, or names no files.
    """
    index = folder / WEIGHT_INDEX_NAME
    if not index.exists():
        return [SINGLE_WEIGHT_FILE_NAME]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PrepareError(
            f"{index}: weight_map: got {weight_map!r}, expected an object that maps tensors to "
            "files"
        )
    for name in weight_map.values():
        if not _is_file_name(name):
            raise PrepareError(
                f"{index}: weight_map: got {short_repr(name)}, expected a file name beside it"
            )
    return sorted(set(weight_map.values()))


def _is_file_name(name: object) -> bool:
    """Return whether a name is that of a file in the checkpoint's folder, or in one below it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises PrepareError that names the file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise PrepareError(
                f"{path}: got more than {MAX_JSON_BYTES} bytes, expected at most that"
            )
        value = json.loads(content)
    except FileNotFoundError as error:
        raise SourceNotFound(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{path}: got invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


def _is_auxiliary_file(path: Path) -> bool:
    if path.name.endswith(_WEIGHT_INDEX_SUFFIX) or not path.is_file():
        return False
    return path.stat().st_size <= _MAX_AUXILIARY_BYTES


def read_auxiliary_files(
    source: CheckpointSource, *, dtype: str | None
) -> Iterator[tuple[str, bytes]]:
    """Yield the name in the store (`model/...`) and the content of each auxiliary file.

    What describes the checkpoint's codes is left out: the store has its own.

    Args:
        source: the checkpoint.
        dtype: the dtype that config.json is changed to; None leaves it unchanged.
    """
    for path in source.auxiliary_files():
        name = f"model/{path.relative_to(source.folder)}"
        is_published = source.published is not None
        if path.name == "config.json" and (dtype is not None or is_published):
            yield name, _store_config(path, dtype)
        elif not (is_published and path.name in QUANTIZATION_FILES):
            yield name, path.read_bytes()


def _store_config(path: Path, dtype: str | None) -> bytes:
    config = without_settings(read_json(path))
    if dtype is not None:
        for section in (config, *(value for value in config.values() if isinstance(value, dict))):
            for field in ("dtype", "torch_dtype"):
                if field in section:
                    section[field] = dtype
        config["dtype"] = dtype
    return (json.dumps(config, indent=2) + "\n").encode()
