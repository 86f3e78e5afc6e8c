"""Fetching a checkpoint from the model hub, pinned to a commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from faasmoe_router.checkpoint.errors import (
    HubUnauthorized,
    HubUnavailable,
    PrepareError,
    SourceNotFound,
    SourceUnsupported,
    causes,
)
from faasmoe_router.checkpoint.index import weight_names

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
_REASONS: tuple[tuple[type[Exception], type[PrepareError], str], ...] = (
    (
        GatedRepoError,
        HubUnauthorized,
        "access is gated: set HF_TOKEN to a token that was granted access",
    ),
    (RevisionNotFoundError, SourceNotFound, "there is no such revision"),
    (
        RepositoryNotFoundError,
        SourceNotFound,
        "there is no such repository, or HF_TOKEN lacks access to it",
    ),
    (HFValidationError, SourceUnsupported, "expected ORG/NAME"),
    (
        LocalEntryNotFoundError,
        HubUnavailable,
        "the hub cannot be reached and the local cache does not have it",
    ),
    (OfflineModeIsEnabled, HubUnavailable, "the hub may not be asked: HF_HUB_OFFLINE is set"),
    (HTTPError, HubUnavailable, "the hub does not answer as it should"),
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
    except tuple(kind for kind, *_ in _REASONS) as error:
        refused, reason = _why(error)
        raise refused(
            f"source: got {repository!r} at revision {revision or 'main'!r}: {reason}"
        ) from error
    return folder, commit


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _why(error: Exception) -> tuple[type[PrepareError], str]:
    """Return our error for the hub's, and the reason in words."""
    known = next(((ours, text) for kind, ours, text in _REASONS if isinstance(error, kind)))
    status = _status(error)
    if known[0] is not HubUnavailable or status is None:
        return known
    if status in (401, 403):
        return HubUnauthorized, f"the hub answered {status}: HF_TOKEN is wrong or lacks access"
    return HubUnavailable, f"the hub answered {status}"


def _status(error: Exception) -> int | None:
    """Return the status of the hub's answer that an error comes from; None if there was none."""
    answers = (cause for cause in causes(error) if isinstance(cause, HfHubHTTPError))
    answer = next(answers, None)
    return None if answer is None else int(answer.response.status_code)
