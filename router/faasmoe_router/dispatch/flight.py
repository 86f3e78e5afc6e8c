"""A call that is under way, and when something is to be done about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from faasmoe_router.dispatch.calls import Call
from faasmoe_router.dispatch.connection import Connection


@dataclass(slots=True)
class Flight:
    """A call in flight; times are monotonic.

    Attributes:
        position: what it is for.
        call: what was sent.
        connection: over which.
        begun_s: when.
        connect_by_s: when the connection must be there.
        end_by_s: when the answer must be whole.
        hedge_s: when to ask for a hedge.
        slow_s: when to ask whether it is too slow.
        is_paired: whether another call was made for the same position.
    """

    position: int
    call: Call
    connection: Connection
    begun_s: float
    connect_by_s: float = math.inf
    end_by_s: float = math.inf
    hedge_s: float = math.inf
    slow_s: float = math.inf
    is_paired: bool = False

    @property
    def ends_by_s(self) -> float:
        """When it is given up in any case."""
        return self.end_by_s if self.connection.connected else min(self.end_by_s, self.connect_by_s)

    @property
    def due_s(self) -> float:
        """When something is to be done about it."""
        return min(self.ends_by_s, self.hedge_s, self.slow_s)
