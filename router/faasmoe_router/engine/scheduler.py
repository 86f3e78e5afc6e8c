"""The engine's scheduler: transformers' first-in-first-out one, with one fault repaired.

It also sees, in the engine's thread and ten times a second, whether there is any request.
"""

import time
from typing import Any

from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

from faasmoe_router.engine.memory import IdleMemory

NAME = "faasmoe_fifo"


class CancelSafeScheduler(FIFOScheduler):  # type: ignore[misc]
    """Admits waiting requests again after a cancellation, and gives memory back when idle.

    When the cache is full, transformers admits nothing until a running request finishes. If all
    running requests are cancelled instead, what waits would wait for ever.
    """

    def __init__(self, cache: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(cache, *arguments, **named)
        self._memory = IdleMemory(cache.cache_tensor)

    def clear_cancelled_requests(self) -> list[Any]:
        """Remove the cancelled requests; return their states. Called before each batch."""
        cancelled: list[Any] = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        self._memory.note(time.monotonic(), is_idle=not self.has_pending_requests())
        return cancelled


def register() -> str:
    """Make the scheduler known to transformers; return its name there."""
    SCHEDULER_MAPPING[NAME] = CancelSafeScheduler
    return NAME
