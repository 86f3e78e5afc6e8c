"""Angles of rotary embeddings by position, computed once.

transformers computes cosines and sines anew for each batch. Where they depend on nothing but the
position, a program takes them from a table, which grows with the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from faasmoe_transformers.observation import RotaryCall

FIXED_ROPE_TYPES = frozenset(("default", "linear", "llama3", "proportional", "yarn"))
"""Kinds whose frequencies do not depend on the length of a sequence."""

LEAST_POSITIONS = 512


class RotaryTable:
    """The angles of one rotary call.

    Args:
        call: computes angles.
    """

    def __init__(self, call: RotaryCall) -> None:
        self._call = call
        self._is_fixed = has_fixed_angles(call.module)
        self._n_positions = 0
        self._cosines = self._sines = torch.empty(0)  # float32 [positions, angles] each

    def angles(self, hidden: Tensor, positions: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [T, angles] each.

        Args:
            hidden: hidden states [1, T, H], for dtype and device.
            positions: positions of the rows, int32 [T].
            highest: the highest of them, or a higher one.
        """
        if not self._is_fixed:
            return self._call.angles(hidden, positions.unsqueeze(0))
        if highest >= self._n_positions:
            self._extend(hidden, max(LEAST_POSITIONS, 2 * self._n_positions, highest + 1))
        return self._cosines.index_select(0, positions), self._sines.index_select(0, positions)

    def _extend(self, hidden: Tensor, n_positions: int) -> None:
        all_positions = torch.arange(n_positions, dtype=torch.int32).unsqueeze(0)  # [1, positions]
        self._cosines, self._sines = self._call.angles(hidden, all_positions)
        self._n_positions = n_positions


def has_fixed_angles(module: Any) -> bool:
    """Return whether a rotary embedding's angles are known to depend on the position alone."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, Mapping):  # by type of layer
        kinds = kinds.values()
    elif isinstance(kinds, str):
        kinds = (kinds,)
    return isinstance(kinds, Iterable) and FIXED_ROPE_TYPES.issuperset(kinds)
