"""The engine's scheduler: transformers' first-in-first-out one, with one fault repaired."""

from typing import Any

from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

NAME = "faasmoe_fifo"


class CancelSafeScheduler(FIFOScheduler):  # type: ignore[misc]
    """Admits waiting requests again after a cancellation.

    When the cache is full, transformers admits nothing until a running request finishes. If all
    running requests are cancelled instead, what waits would wait for ever.
    """

    def clear_cancelled_requests(self) -> list[Any]:
        """Remove the cancelled requests; return their states."""
        cancelled: list[Any] = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


def register() -> str:
    """Make the scheduler known to transformers; return its name there."""
    SCHEDULER_MAPPING[NAME] = CancelSafeScheduler
    return NAME
