"""Fetching a checkpoint from the model hub, pinned to a commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from faasmoe_router.checkpoint.errors import PrepareError
from faasmoe_router.checkpoint.index import weight_names

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "access is gated: set HF_TOKEN to a token that was granted access"),
    (RevisionNotFoundError, "there is no such revision"),
    (RepositoryNotFoundError, "there is no such repository, or HF_TOKEN lacks access to it"),
    (LocalEntryNotFoundError, "the hub cannot be reached and the local cache does not have it"),
    (HFValidationError, "expected ORG/NAME"),
)


def download(repository: str, *, revision: str | None) -> tuple[Path, str]:
    """Fetch config, tokenizer and safetensors files; return the local folder and its commit.

    Raises:
        PrepareError: the repository or revision cannot be had; says why.
    """
    try:
        folder = _fetch(repository, revision, _SMALL_FILES)
        commit = folder.name  # the hub's cache names a snapshot's folder after its commit
        _fetch(repository, commit, weight_names(folder))
    except tuple(kind for kind, _ in _REASONS) as error:
        reason = next(text for kind, text in _REASONS if isinstance(error, kind))
        raise PrepareError(
            f"source: got {repository!r} at revision {revision or 'main'!r}: {reason}"
        ) from error
    return folder, commit


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
