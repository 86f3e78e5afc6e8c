"""Which bytes of which files functions map: models that map the same ones count them once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store

DIGEST_CHARS = 16
Place = tuple[str, int, int, int]
"""A parameter's name, device and inode of its file (of a hard link, those of all), and offset."""


class FunctionContents:
    """Names what functions of one store map: the same for functions that map the same bytes.

    Args:
        store: the store, whose files are looked at once.
    """

    def __init__(self, store: Store) -> None:
        self._layers = store.manifest.layers
        self._map_layer = cache(store.map_layer)
        self._status = cache(os.stat)

    def content_of(self, spec: FunctionSpec) -> str:
        """Return the name of what a function maps.

        Raises:
            StoreError: a file of the store is missing or damaged.
            OSError: one is gone.
        """
        places = [tuple(self._places(layer, spec.experts)) for layer in spec.layers]
        return hashlib.sha256(repr(places).encode()).hexdigest()[:DIGEST_CHARS]

    def _places(self, index: int, experts: Sequence[int]) -> Iterator[Place]:
        """Yield where the parameters of experts of a layer lie, and those of all."""
        mapped, n_experts = self._map_layer(index), self._layers[index].num_experts
        for name, view in sorted(mapped.tensors.items()):
            pieces = view.pieces
            if view.is_stacked(n_experts):
                pieces = tuple(chain.from_iterable(map(view.expert_pieces, experts)))
            for piece in pieces:
                status = self._status(Path(mapped.files[piece.file].path))
                yield name, status.st_dev, status.st_ino, piece.offset
