"""The (row, expert) pairs of a frame, and the ways to walk over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE_ROWS = 8  # rows of every product in unreduced mode: equal shapes give equal bits


@dataclass(frozen=True, slots=True)
class Run:
    """Pairs of some experts, laid out one expert after the other for products into one tensor.

    Attributes:
        positions: of its pairs, by expert, ascending, int64 [n].
        places: the row of the layout that each of them has, int64 [n].
        spans: (expert, first row, row after the last) of each expert in the layout; what is not a
            pair's is padding.
        n_rows: rows of the layout.
    """

    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    spans: tuple[tuple[int, int, int], ...]
    n_rows: int

    @classmethod
    def of(cls, groups: Sequence[tuple[int, NDArray[np.int64], int]]) -> Run:
        """Lay out groups of (expert, positions, rows with padding)."""
        places, spans, begin = [], [], 0
        for expert, positions, n_rows in groups:
            places.append(np.arange(begin, begin + len(positions)))
            spans.append((expert, begin, begin + n_rows))
            begin += n_rows
        found = np.concatenate([positions for _, positions, _ in groups])
        return cls(found, np.concatenate(places), tuple(spans), begin)


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is to be computed for the rows of a frame.

    Attributes:
        row: row of each pair, int32 [P].
        expert: global expert index of each pair, int32 [P].
        weight: routing weight of each pair, float32 [P], on the device of the rows.
    """

    row: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: Tensor

    def __len__(self) -> int:
        """Return P."""
        return len(self.row)

    def by_expert(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each expert, ascending, with the positions of its pairs, ascending."""
        order = np.argsort(self.expert, kind="stable")
        grouped = self.expert[order]
        cuts = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
        for positions in np.split(order, cuts):
            yield int(self.expert[positions[0]]), positions

    def runs(self, pad: Callable[[int], int], *, max_rows: int) -> Iterator[Run]:
        """Yield all pairs in runs of whole experts, ascending.

        Args:
            pad: how many rows an expert gets for so many pairs.
            max_rows: of a run; an expert that has more is a run of its own.
        """
        groups: list[tuple[int, NDArray[np.int64], int]] = []
        total = 0
        for expert, positions in self.by_expert():
            n_rows = pad(len(positions))
            if groups and total + n_rows > max_rows:
                yield Run.of(groups)
                groups, total = [], 0
            groups.append((expert, positions, n_rows))
            total += n_rows
        yield Run.of(groups)

    def tiles(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield an expert, the positions of up to 8 of its pairs [n], and their rows [8, H].

        Args:
            hidden: [T, H]; a tile that is not full ends in rows of zeros.
        """
        for expert, positions in self.by_expert():
            for start in range(0, len(positions), TILE_ROWS):
                chosen = positions[start : start + TILE_ROWS]
                rows = hidden.new_zeros(TILE_ROWS, hidden.shape[1])  # [8, H]
                rows[: len(chosen)] = hidden[as_index(self.row[chosen], hidden.device)]
                yield expert, as_index(chosen, hidden.device), rows


def as_index(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return int64 indices on `device`."""
    return torch.from_numpy(values.astype(np.int64, copy=False)).to(device)
