"""An entry of the table of private names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A name of torch or transformers that may change without notice.

    Attributes:
        location: where it is, see the package's docstring.
        used_by: the module of this package that uses it.
        reason: what it is needed for.
    """

    location: str
    used_by: str
    reason: str

    @property
    def library(self) -> str:
        """The library that it belongs to."""
        return self.location.partition(":")[0].partition(".")[0]

    @property
    def attribute(self) -> str:
        """The last component of the location, without parameter or key."""
        path = self.location.partition(":")[2].partition("(")[0].partition("[")[0]
        return path.rpartition(".")[2]


def names(owner: str, attributes: str, used_by: str, reason: str) -> list[PrivateName]:
    """Return one entry for each of `attributes`, which are appended to `owner`."""
    return [PrivateName(owner + name, used_by, reason) for name in attributes.split()]
