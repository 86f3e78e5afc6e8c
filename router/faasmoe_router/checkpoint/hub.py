"""Access to a model hub: the name of a repository, its files, their download, and what fails.

Only huggingface_hub talks to the hub; its errors become PrepareErrors that say what to do.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_session, snapshot_download
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

from faasmoe_router.checkpoint.progress_bar import LineProgress
from faasmoe_router.errors import (
    HubUnauthorized,
    HubUnavailable,
    PrepareError,
    SourceNotFound,
    SourceUnsupported,
    cause_chain,
)

HUB_SCHEME = "hf"
HUB_TIMEOUT_S = 20.0
_ID = re.compile(r"(?P<repository>[^/:]+/[^/:]+)(:(?P<file>[^:]+))?")
_ERRORS: tuple[tuple[type[Exception], type[PrepareError], str], ...] = (
    (
        GatedRepoError,
        HubUnauthorized,
        "access is gated: set HF_TOKEN to a token that was granted access",
    ),
    (RevisionNotFoundError, SourceNotFound, "there is no such revision"),
    (
        RepositoryNotFoundError,
        SourceNotFound,
        "the hub has no such repository, or HF_TOKEN lacks access to it: check the spelling",
    ),
    (HFValidationError, SourceUnsupported, "expected ORG/NAME"),
    (
        LocalEntryNotFoundError,
        HubUnavailable,
        "the hub cannot be reached and the local cache does not have it: check the network, "
        "HF_ENDPOINT and proxies, or name a folder that holds the checkpoint",
    ),
    (OfflineModeIsEnabled, HubUnavailable, "offline mode: HF_HUB_OFFLINE is set"),
    (HTTPError, HubUnavailable, "unexpected error from the hub"),
)


@dataclass(frozen=True, slots=True)
class HubName:
    """The name of a checkpoint on the hub.

    Attributes:
        repository: ORG/NAME, or what was given in its place.
        file: what follows a colon: a GGUF file in it, or how its weights are quantised.
    """

    repository: str
    file: str | None

    @classmethod
    def of(cls, source: str) -> HubName | None:
        """Return the name that a source has on the hub; None if it is a local one.

        A source is on the hub if it starts with hf://, or is ORG/NAME or ORG/NAME:FILE and no path
        of this machine.
        """
        parts = urlsplit(source)
        is_explicit = parts.scheme == HUB_SCHEME
        name = source.partition("://")[2] if is_explicit else source
        match = _ID.fullmatch(name)
        if is_explicit:
            return cls(match["repository"], match["file"]) if match else cls(name, None)
        if match is None or source.startswith((".", "~")) or Path(source).exists():
            return None
        is_file = match["file"] is None and name.lower().endswith(".gguf")
        return None if is_file else cls(match["repository"], match["file"])


@contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Raise PrepareError for errors of the hub's client; the message says why and what to do."""
    try:
        yield
    except tuple(error for error, *_ in _ERRORS) as error:
        error_class, reason = _translate(error)
        raise error_class(
            f"source: got {repository!r} at revision {revision or 'main'!r}, looked for at "
            f"{constants.ENDPOINT}: {reason}"
        ) from error


def download_files(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Download the files that match a pattern, unless cached; return their folder.

    The hub's cache names the folder after the commit.
    """
    lines = None if sys.stderr.isatty() else LineProgress  # None: the hub's own bars
    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            tqdm_class=lines,
            local_files_only=not _is_hub_reachable(),
        )
    )


def _is_hub_reachable() -> bool:
    """Return whether the hub answers at all; its client retries for minutes until it says so."""
    if constants.HF_HUB_OFFLINE:
        return True  # the client says itself that it is offline
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except HTTPError:
        return False
    return True


def exact_pattern(name: str) -> str:
    """Return the pattern for `download_files` that only this file matches."""
    return glob.escape(name)


def list_files(repository: str, revision: str | None) -> list[str]:
    """Return the names of a repository's files; those in the cache if the hub is unreachable."""
    if not _is_hub_reachable():
        return _list_cached_files(repository, revision)
    try:
        info = HfApi().model_info(repository, revision=revision)
    except (OfflineModeIsEnabled, HTTPError) as error:
        if _http_status(error) is not None:
            raise
        return _list_cached_files(repository, revision)
    return sorted(file.rfilename for file in info.siblings or ())


def _list_cached_files(repository: str, revision: str | None) -> list[str]:
    cached = snapshot_download(  # a part of the files is enough: none is asked for
        repository, revision=revision, local_files_only=True, allow_patterns=[]
    )
    folder = Path(cached)
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _translate(error: Exception) -> tuple[type[PrepareError], str]:
    """Return the PrepareError class of an error of the hub's client, and the reason."""
    translation = next(
        (error_class, reason)
        for hub_error, error_class, reason in _ERRORS
        if isinstance(error, hub_error)
    )
    status = _http_status(error)
    if translation[0] is not HubUnavailable or status is None:
        return translation
    if status in (401, 403):
        return HubUnauthorized, f"the hub answered {status}: HF_TOKEN is wrong or lacks access"
    return HubUnavailable, f"the hub answered {status}"


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status that caused an error; None if the hub sent no response."""
    http_errors = (cause for cause in cause_chain(error) if isinstance(cause, HfHubHTTPError))
    http_error = next(http_errors, None)
    return None if http_error is None else int(http_error.response.status_code)
