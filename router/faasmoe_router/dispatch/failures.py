"""What is logged of failed calls: a sandbox that is gone would else fill the log by itself."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from faasmoe_router.dispatch.errors import CallError

log = logging.getLogger(__name__)

INTERVAL_S = 10.0  # at most one line for each address in this time


@dataclass(slots=True)
class _Told:
    """When an address was last told of, and the failures since."""

    at_s: float
    n_since: int = 0


class FailureLog:
    """Logs an address's first failure, and how many there were since every now and then."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def note(self, address: str, error: CallError, now_s: float) -> None:
        """Log a failed call, or count it."""
        told = self._told.get(address)
        if told is not None and now_s - told.at_s < INTERVAL_S:
            told.n_since += 1
            return
        if told is None or not told.n_since:
            log.warning("a call to %s failed: %s", address, error)
        else:
            log.warning(
                "%d more calls to %s failed in %.0f s, the last: %s",
                *(told.n_since + 1, address, now_s - told.at_s, error),
            )
        self._told[address] = _Told(now_s)

    def keep(self, addresses: Collection[str]) -> None:
        """Forget all other addresses."""
        for address in self._told.keys() - addresses:
            del self._told[address]
