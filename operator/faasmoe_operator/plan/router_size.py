"""What a router takes of a machine's memory, with its part of weights that several map. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

PROCESS_BYTES = 150_000_000  # beside its weights, until it is measured


@dataclass(frozen=True, slots=True)
class RouterSize:
    """The size of one router.

    Attributes:
        weights_bytes: its weights.
        content: name of the files that it maps them from, equal for routers that map the same;
            empty if it shares them with nobody.
        own_bytes: what it has of its own beside them; None until it is measured.
        mapped_bytes: its weights that it was found to map; all until it is measured.
    """

    weights_bytes: int = 0
    content: str = ""
    own_bytes: int | None = None
    mapped_bytes: int | None = None

    def measured(self, own_bytes: int, file_bytes: int, *, n_sharing: int) -> RouterSize:
        """Return it as it was found.

        Weights that are copies, in another dtype or on a device, are no pages of a file.

        Args:
            own_bytes: its part (PSS) of pages that are no file's, so a process of equal pages less.
            file_bytes: its part of those of files.
            n_sharing: how many routers mapped the same weights.
        """
        mapped_bytes = min(self.weights_bytes, file_bytes * max(1, n_sharing))
        return replace(self, own_bytes=own_bytes, mapped_bytes=mapped_bytes)

    def bytes_among(self, n_sharing: int, *, like_it: int | None = None) -> int:
        """Return what it counts for.

        Args:
            n_sharing: how many routers map its weights, itself included.
            like_it: what one of equal weights was found to have of its own, if any was.
        """
        expected_bytes = PROCESS_BYTES if like_it is None else like_it
        own_bytes = expected_bytes if self.own_bytes is None else self.own_bytes
        mapped_bytes = self.weights_bytes if self.mapped_bytes is None else self.mapped_bytes
        return own_bytes + -(-mapped_bytes // max(1, n_sharing if self.content else 1))


def largest_own_bytes(sizes: Iterable[RouterSize]) -> Mapping[str, int]:
    """Return the most that a router of each content was found to have of its own."""
    found: dict[str, int] = {}
    for size in sizes:
        if size.content and size.own_bytes is not None:
            found[size.content] = max(size.own_bytes, found.get(size.content, 0))
    return found
