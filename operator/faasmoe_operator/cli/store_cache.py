"""Where the stores of `faasmoe up MODEL` are kept, and whether they are of the checkpoint as it is.

Each checkpoint has a folder per revision, dtype and quantisation below the user's cache folder. A
stamp beside it, of names, sizes and times of the checkpoint's files, tells when a local checkpoint
has changed since. A hub repository has none: its store is kept until it is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_contracts.store import MANIFEST_NAME, QuantizationEntry
from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.errors import CommandError

DIGEST_CHARS = 12
STAMP_SUFFIX = ".checkpoint"


def stores_folder() -> Path:
    """Return the folder of all stores of this user: $XDG_CACHE_HOME/faasmoe/stores."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path is invalid and ignored.
    base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "faasmoe" / "stores"


@dataclass(frozen=True, slots=True)
class CachedStore:
    """The store of a MODEL.

    Attributes:
        source: the checkpoint.
        path: the store's folder.
    """

    source: ModelSource
    path: Path

    @classmethod
    def of(
        cls,
        source: ModelSource,
        *,
        revision: str | None,
        dtype: str | None,
        quantization: QuantizationEntry,
    ) -> CachedStore:
        """Return the store of a checkpoint with these settings.

        Args:
            source: the checkpoint.
            revision: branch, tag or commit on the hub; None for its default.
            dtype: dtype of the store; None for the checkpoint's.
            quantization: what the store quantises.
        """
        identity = [source.uri, revision, dtype, quantization.experts, quantization.router]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:DIGEST_CHARS]
        return cls(source, stores_folder() / f"{source.name}-{digest}")

    @property
    def is_prepared(self) -> bool:
        """Whether the store exists and is complete."""
        return (self.path / MANIFEST_NAME).is_file()

    @property
    def is_outdated(self) -> bool:
        """Whether the checkpoint's files have changed since the store was prepared."""
        stamp = self.stamp()
        try:
            return stamp is not None and self._stamp_path.read_text(encoding="utf-8") != stamp
        except FileNotFoundError:
            return False  # not finished: `prepare` compares the checkpoint itself

    @property
    def is_current(self) -> bool:
        """Whether the store is complete and known to be of the checkpoint as it is."""
        if not self.is_prepared or self.is_outdated:
            return False
        return self.source.path is None or self._stamp_path.exists()

    def stamp(self) -> str | None:
        """Return what tells a changed checkpoint; None on the hub. Read it before preparing."""
        if self.source.path is None:
            return None
        stats = ((file.name, file.stat()) for file in self.source.files())
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def write_stamp(self, stamp: str | None) -> None:
        """Record that the store is of the checkpoint with this stamp."""
        if stamp is not None:
            write_atomically(self._stamp_path, stamp)

    def make_parent(self) -> None:
        """Make the folder of all stores; raises CommandError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"{self.path.parent}: cannot be created: {error.strerror}; XDG_CACHE_HOME names "
                "another cache folder"
            ) from error

    @property
    def _stamp_path(self) -> Path:
        return self.path.with_name(self.path.name + STAMP_SUFFIX)
