"""Files that a manifest refers to: of the checkpoint, of the store, or shared with other stores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields

PREPARE_AGAIN = "prepare the store again with --force"
REMEDY = f"restore the checkpoint as it was, or {PREPARE_AGAIN}"
SHARED_FOLDER = "shared"
"""Folder of a store for its hard links of other stores' files."""


def is_path(text: str) -> bool:
    """Return whether the system can be asked for a path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def is_inner_path(name: str) -> bool:
    """Return whether a name is that of a file in a folder, or in one below it."""
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
    return is_inside and name != "." and is_path(name)


class FilePlace(StrEnum):
    """Where a file that a manifest refers to lies."""

    CHECKPOINT = "checkpoint"
    """Below the checkpoint's folder."""
    STORE = "store"
    """In the store itself, among `files` of its manifest."""
    SHARED = "shared"
    """In the store, as a hard link of a file of another store or of its checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file that a manifest refers to.

    Attributes:
        name: its path in the checkpoint's folder, or in the store's.
        size_bytes: its size.
        place: which of these folders.
        origin: of a hard link, the path of the file that was linked; it may be gone.
    """

    name: str
    size_bytes: int
    place: FilePlace = FilePlace.CHECKPOINT
    origin: str = ""

    @property
    def kind(self) -> str:
        """Whose file it is, for messages."""
        if self.place is FilePlace.SHARED:
            return f"that it shares, a hard link of {self.origin}"
        return "of its own" if self.place is FilePlace.STORE else "of its checkpoint"

    @property
    def subject(self) -> str:
        """What has changed if it has another size, for messages."""
        if self.place is FilePlace.SHARED:
            return f"{self.origin}, which it shares,"
        return "the store" if self.place is FilePlace.STORE else "the checkpoint"

    @property
    def remedy(self) -> str:
        """What to do if it is missing or changed, for messages."""
        return REMEDY if self.place is FilePlace.CHECKPOINT else PREPARE_AGAIN

    @classmethod
    def from_json(cls, value: object, *, path: str) -> CheckpointFile:
        """Parse and check the entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        name, size_bytes = fields.pop_string("name"), fields.pop_integer("size_bytes", minimum=1)
        place = FilePlace.CHECKPOINT
        if fields.has("place"):
            place = FilePlace(fields.pop_choice("place", (FilePlace.STORE, FilePlace.SHARED)))
        origin = fields.pop_string("origin") if place is FilePlace.SHARED else ""
        fields.reject_unknown()
        if not is_inner_path(name):
            folder = "checkpoint" if place is FilePlace.CHECKPOINT else "store"
            raise fields.error("name", name, f"a path inside the {folder}'s folder")
        return cls(name, size_bytes, place, origin)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this file."""
        value: dict[str, Any] = {"name": self.name, "size_bytes": self.size_bytes}
        if self.place is not FilePlace.CHECKPOINT:
            value["place"] = self.place.value
        return value | ({"origin": self.origin} if self.origin else {})
