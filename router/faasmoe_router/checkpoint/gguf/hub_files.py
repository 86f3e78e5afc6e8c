"""Which GGUF checkpoint of a hub repository is meant, and its download.

ORG/NAME:QUANT and ORG/NAME:FILE.gguf, as llama.cpp and vLLM name them; ORG/NAME alone if the
repository has one GGUF checkpoint and no safetensors files. Parts of a split file belong together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.hub import (
    HubName,
    download_files,
    exact_pattern,
    hub_errors,
    list_files,
)
from faasmoe_router.errors import SourceNotFound, SourceUnsupported

SUFFIX = ".gguf"
MAX_NAMES_SHOWN = 8
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}")
_NO_CHECKPOINT = re.compile(r"(^|[-._])(mmproj|imatrix)([-._]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DownloadedFiles:
    """Files of one commit of a repository in the hub's cache, in order."""

    commit: str
    files: tuple[Path, ...]


def download_gguf(name: HubName, *, revision: str | None) -> DownloadedFiles | None:
    """Download a GGUF checkpoint, unless cached.

    Args:
        name: the repository and the file or quantisation.
        revision: branch, tag or commit; None for the default branch.

    Returns:
        The files of the checkpoint; None if none was named and the repository has no GGUF files, or
        others besides.

    Raises:
        PrepareError: the repository is not accessible, or none or several of its files match.
    """
    with hub_errors(name.repository, revision):
        names = list_files(name.repository, revision)
        checkpoints = group_files(names)
        if name.file is None:
            is_other = any(n.endswith((".safetensors", ".safetensors.index.json")) for n in names)
            if is_other or not checkpoints:
                return None
        chosen = choose_checkpoint(name, checkpoints)
        folder = download_files(name.repository, revision, map(exact_pattern, chosen))
    return DownloadedFiles(folder.name, tuple(folder / file for file in chosen))


def group_files(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the GGUF checkpoints among the files of a repository: their parts by their stem."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        is_inside = not path.is_absolute() and ".." not in path.parts
        if path.suffix.lower() != SUFFIX or not is_inside or _NO_CHECKPOINT.search(path.stem):
            continue
        stem = name[: -len(SUFFIX)]
        part = _PART.fullmatch(stem)
        groups.setdefault(part["stem"] if part else stem, []).append(name)
    return {stem: tuple(files) for stem, files in groups.items()}


def choose_checkpoint(name: HubName, checkpoints: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the files of the checkpoint that a name means.

    Args:
        name: the repository and the file or quantisation.
        checkpoints: the files of each of its checkpoints, by stem.

    Raises:
        SourceNotFound: it has no such checkpoint.
        SourceUnsupported: it has several.
    """
    found = [stem for stem, files in checkpoints.items() if _is_meant(name.file, stem, files)]
    if len(found) == 1:
        return checkpoints[found[0]]
    stems = found or list(checkpoints)
    shown = ", ".join(f"{stem}{SUFFIX}" for stem in stems[:MAX_NAMES_SHOWN])
    more = f" and {len(stems) - MAX_NAMES_SHOWN} more" if len(stems) > MAX_NAMES_SHOWN else ""
    got = f"source: got {name.repository!r}" + (f" with {short_repr(name.file)}" * bool(name.file))
    if not checkpoints:
        raise SourceNotFound(f"{got}, but the repository has no GGUF files, expected ORG/NAME")
    expected = "expected ORG/NAME:QUANT or ORG/NAME:FILE of"
    if not found:
        raise SourceNotFound(f"{got}, which is none of its GGUF files, {expected} {shown}{more}")
    raise SourceUnsupported(f"{got}, which are {len(found)} checkpoints, {expected} {shown}{more}")


def _is_meant(file: str | None, stem: str, files: tuple[str, ...]) -> bool:
    """Return whether a file name or quantisation, in any case, means the checkpoint of a stem."""
    if file is None:
        return True
    if file.lower().endswith(SUFFIX):
        return file in files or file == f"{stem}{SUFFIX}"
    return re.search(rf"(^|[-._/]){re.escape(file)}($|[-./])", stem, re.IGNORECASE) is not None
