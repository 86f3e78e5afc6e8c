"""What an operator still waits for before it looks after models; empty when it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Readiness:
    """Told by `/readyz`.

    Attributes:
        waits_for: what is still missing, in words; empty once models are looked after.
    """

    waits_for: str = "the API server"

    @property
    def is_ready(self) -> bool:
        """Whether models are looked after."""
        return not self.waits_for
