"""Which process a model gets a share of, where sandboxes hold functions of several models. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_MODELS = 32
"""Of a process, which serves 64 mailboxes: one for each router of each model."""


@dataclass(frozen=True, slots=True)
class SharedProcess:
    """A sandbox process whose functions are those of one model or several.

    Attributes:
        id: its id on the platform.
        models: the models that have a share in it, which is one sandbox for each of them.
        failed_for: models that found it to fail, which get no share of it again.
    """

    id: str
    models: frozenset[str] = frozenset()
    failed_for: frozenset[str] = frozenset()

    def is_open_to(self, model: str) -> bool:
        """Return whether a model may get a share: at most one, so that ids stay unique."""
        has_room = len(self.models) < MAX_MODELS
        return has_room and model not in self.models and model not in self.failed_for


def n_suitable_processes(n_processors: int, threads: int) -> int:
    """Return how many processes of so many compute threads keep all processors busy."""
    return max(1, n_processors // threads)


def choose_process(
    processes: Sequence[SharedProcess], model: str, *, n_suitable: int
) -> str | None:
    """Return the process of which a model gets a share; None if it is to get another process.

    Functions are spread over as many processes as suit the machine before any process is shared.
    Then the process that the fewest models share is chosen, the oldest of several.

    Args:
        processes: those in use, oldest first.
        model: the model.
        n_suitable: how many processes suit the machine.
    """
    if len(processes) < n_suitable:
        return None
    candidates = (process for process in processes if process.is_open_to(model))
    chosen = min(candidates, key=lambda process: len(process.models), default=None)
    return None if chosen is None else chosen.id
