"""What files contain, as digests: files are read once for as long as they do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from faasmoe_expert.functions.verification import file_identity
from faasmoe_kernels.function_layers import FileIdentity

Content = frozenset[tuple[str, str]]
"""Names and digests of files."""


class FileContents:
    """Digests of files by their identity; inherited by processes that are forked."""

    def __init__(self) -> None:
        self._digests: dict[FileIdentity, str] = {}

    def of_folder(self, folder: Path, *, without: Collection[str] = ()) -> Content:
        """Return the content of all files in a folder; raises OSError.

        Args:
            folder: the folder, with all below it.
            without: names of files to leave out.
        """
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in without]
        return frozenset((str(path.relative_to(folder)), self.digest(path)) for path in files)

    def digest(self, path: Path) -> str:
        """Return the digest of a file; raises OSError."""
        identity = file_identity(path)
        if identity is None or identity not in self._digests:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if identity is None:
                return digest
            self._digests[identity] = digest
        return self._digests[identity]


CONTENTS = FileContents()
"""This process's; routers have what their zygote had."""
