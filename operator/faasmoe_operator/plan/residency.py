"""Which functions share a sandbox, when all of them stay resident. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from faasmoe_expert.table import FunctionSpec


def spread(
    functions: Sequence[FunctionSpec], *, capacity: int
) -> tuple[tuple[FunctionSpec, ...], ...]:
    """Return the functions of each sandbox: as few sandboxes as can be, evenly filled.

    Dealt out in turn, so that the blocks of one layer, which are called at the same time, come to
    different sandboxes wherever there are as many.
    """
    sandboxes = -(-len(functions) // capacity)
    return tuple(tuple(functions[first::sandboxes]) for first in range(sandboxes))
