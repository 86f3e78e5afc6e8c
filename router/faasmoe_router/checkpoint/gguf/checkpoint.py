"""A GGUF file, or the files of a split one, as a checkpoint that can be prepared.

Config, tokenizer and chat template are written to a temporary folder, which stands for the folder
that other checkpoints are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import unquote, urlsplit

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_router.checkpoint.gguf.architectures import (
    Architecture,
    find_architecture,
    name_tensors,
)
from faasmoe_router.checkpoint.gguf.header import Header, TensorInfo, read_header
from faasmoe_router.checkpoint.gguf.hub_files import SUFFIX, download_gguf
from faasmoe_router.checkpoint.gguf.metadata import Metadata
from faasmoe_router.checkpoint.gguf.model_config import generation_config, model_config
from faasmoe_router.checkpoint.gguf.tensors import GgufTensor, OpenFile
from faasmoe_router.checkpoint.gguf.vocabulary import write_tokenizer
from faasmoe_router.checkpoint.hub import HubName
from faasmoe_router.checkpoint.source import CheckpointSource
from faasmoe_router.errors import PrepareError, SourceDamaged, SourceNotFound, SourceUnsupported
from faasmoe_transformers.weight_conversion import LazyTensor

logger = logging.getLogger(__name__)

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FORMAT = 1  # of what is made of a file; a change makes stores of it anew


class TemporaryFolder:
    """A folder that is removed with this object, at the latest when the process ends."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="faasmoe-gguf-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufCheckpoint(CheckpointSource):
    """A checkpoint of one or several GGUF files.

    Attributes:
        architecture: the files' architecture.
        metadata: the keys of the first file.
        headers: the header of each file.
        workspace: owns the folder, which is removed with it.
    """

    architecture: Architecture
    metadata: Metadata
    headers: Mapping[Path, Header]
    workspace: TemporaryFolder = field(repr=False)

    def fingerprint(
        self,
        *,
        dtype: str | None,
        quantization: QuantizationEntry = QuantizationEntry(),  # noqa: B008
    ) -> str:
        """Return a hash that changes if the files or an argument change."""
        identity: dict[str, Any] = {
            "gguf": _FORMAT,
            "dtype": dtype,
            "config": self.config,
            "files": [self._file_identity(path) for path in self.weight_files],
            "quantization": quantization.to_json(),
        }
        if self.revision is not None:
            identity["revision"] = self.revision
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def open_tensors(self, *, allows_nonfinite: bool = False) -> Iterator[dict[str, LazyTensor]]:
        """Open every tensor by the name of its parameter; write the tokenizer to the folder.

        Args:
            allows_nonfinite: whether floats may be NaN or infinite; scales of codes never may.

        Raises:
            PrepareError: a file cannot be read, or the tokenizer cannot be built.
        """
        first = str(self.weight_files[0])
        rows = self.config["vocab_size"]
        write_tokenizer(self.architecture.name, self.metadata, self.folder, max_tokens=rows)
        with ExitStack() as stack:
            tensors: dict[str, GgufTensor] = {}
            for path, header in self.headers.items():
                file = stack.enter_context(OpenFile(path))
                for name, info in header.tensors.items():
                    tensors[name] = GgufTensor(file, info, allows_nonfinite=allows_nonfinite)
            yield name_tensors(self.architecture, tensors, first)


def find_gguf_checkpoint(name: str, *, revision: str | None) -> GgufCheckpoint | None:
    """Return the checkpoint if a source is a GGUF file, or a folder with one and no other weights.

    A file on the hub is downloaded.

    Args:
        name: the source, as for `prepare`.
        revision: of a hub repository; None for a local file.

    Raises:
        PrepareError: the file, or one of the parts of a split file, is missing or invalid, the
            folder or repository has several, or the hub cannot be reached.
    """
    if (hub_name := HubName.of(name)) is not None:
        found = download_gguf(hub_name, revision=revision)
        if found is None:
            return None
        return _open_checkpoint(name, split_files(found.files[0]), found.commit)
    path = _local_path(name)
    if path is None:
        return None
    if path.is_dir():
        if (path / "config.json").exists() or not (files := sorted(path.glob(f"*{SUFFIX}"))):
            return None
        path = _only_checkpoint(path, files)
    elif path.suffix.lower() != SUFFIX:
        return None
    if revision is not None:
        raise PrepareError(f"revision: got {revision!r}, expected none for the file {path}")
    return _open_checkpoint(name, split_files(path), None)


def _local_path(name: str) -> Path | None:
    parts = urlsplit(name)
    if parts.scheme and parts.scheme != "file":
        return None
    return Path(unquote(parts.path)) if parts.scheme else Path(name).expanduser()


def _only_checkpoint(folder: Path, files: Sequence[Path]) -> Path:
    stems = {match["stem"] if (match := _SPLIT_NAME.fullmatch(p.name)) else p.name for p in files}
    if len(stems) > 1:
        names = ", ".join(sorted(stems)[:5])
        raise SourceUnsupported(
            f"{folder}: got {len(stems)} GGUF checkpoints ({names}), expected one: name the file"
        )
    return files[0]


def split_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a checkpoint: all parts of a split one, in order.

    Raises:
        SourceNotFound: a file is missing; the message names it.
    """
    files: tuple[Path, ...] = (path,)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match and 1 <= int(match["number"]) <= int(match["count"]):
        count = match["count"]
        names = (f"{match['stem']}-{n:05}-of-{count}{SUFFIX}" for n in range(1, int(count) + 1))
        files = tuple(path.with_name(name) for name in names)
    for file in files:
        if not file.is_file():
            part = "" if len(files) == 1 else f", one of {len(files)} parts of a checkpoint"
            raise SourceNotFound(f"{file}: got no such file, expected a GGUF file{part}")
    return files


def _open_checkpoint(name: str, files: tuple[Path, ...], commit: str | None) -> GgufCheckpoint:
    headers = {path: read_file_header(path) for path in files}
    first = str(files[0])
    metadata = Metadata(headers[files[0]].metadata, first)
    architecture = find_architecture(metadata.string("general.architecture"), first)
    config = model_config(architecture, metadata, merge_tensors(headers))
    workspace = TemporaryFolder()
    folder = workspace.path
    for file, content in (
        ("config.json", config),
        ("generation_config.json", generation_config(metadata)),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    return GgufCheckpoint(
        name,
        commit,
        folder,
        files,
        config,
        architecture=architecture,
        metadata=metadata,
        headers=headers,
        workspace=workspace,
    )


def read_file_header(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        PrepareError: the file cannot be read.
        SourceDamaged: its header is not valid.
    """
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            return read_header(file, name=str(path), size_bytes=size_bytes)
    except OSError as error:
        raise PrepareError(f"{path}: cannot be read: {error.strerror}") from error


def merge_tensors(headers: Mapping[Path, Header]) -> dict[str, TensorInfo]:
    """Return the tensors of all parts of a checkpoint.

    Raises:
        SourceDamaged: a part is of another checkpoint, or repeats a tensor of an earlier one.
    """
    tensors: dict[str, TensorInfo] = {}
    for index, (path, header) in enumerate(headers.items()):
        _check_part(path, header, index, len(headers))
        for name, info in header.tensors.items():
            if name in tensors:
                raise SourceDamaged(f"{path}: {name}: got the tensor again, expected it once")
            tensors[name] = info
    first_path, first = next(iter(headers.items()))
    expected = Metadata(first.metadata, str(first_path)).optional_integer(
        "split.tensors.count", minimum=0
    )
    if len(headers) > 1 and expected is not None and expected != len(tensors):
        raise SourceDamaged(
            f"{first_path}: split.tensors.count: got {expected}, expected {len(tensors)}, the "
            f"tensors in {len(headers)} files"
        )
    return tensors


def _check_part(path: Path, header: Header, index: int, count: int) -> None:
    metadata = Metadata(header.metadata, str(path))
    for key, expected in (("split.no", index), ("split.count", count)):
        default = expected if count == 1 else None
        got = metadata.optional_integer(key, minimum=0)
        got = default if got is None else got
        if got != expected and not (count == 1 and got in (0, 1)):
            raise metadata.error(key, got, f"{expected}: part {index + 1} of {count} by its name")


def type_counts(tensors: Mapping[str, TensorInfo]) -> Counter[str]:
    """Return how many tensors each type has."""
    return Counter(info.type.name for info in tensors.values())
