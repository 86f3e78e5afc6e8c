"""What names one MoEModel of the cluster."""

from __future__ import annotations

from typing import NamedTuple


class ModelKey(NamedTuple):
    """Namespace and name of a MoEModel."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
