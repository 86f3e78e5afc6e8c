"""How long a sender pauses between its turns beside others; only decides, no side effects.

Whoever sends sixty requests in one moment would otherwise have the router prepare one after the
other, and what others wait for then competes with all of them for one interpreter. A pause that
follows from what the turn took leaves them most of it, on any machine, and gives clients that hang
up the time to do so before the router knows of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

PAUSE_FACTOR = 4.0  # times a turn: of the time beside others a fifth is a sender's, for each turn
MAX_PAUSE_S = 0.25
ACTIVE_S = 1.0  # after its last turn, a sender may have another request at any moment


class TurnPacing:
    """The senders that have had turns lately; times are passed in.

    Strangers, whose name is empty, make nobody pause.
    """

    def __init__(self) -> None:
        self._active_until_s: OrderedDict[Hashable, float] = OrderedDict()  # by last turn

    def pause_after(self, sender: Hashable, elapsed_s: float, now_s: float) -> float:
        """Return for how many seconds a turn that ends now is not passed on.

        Args:
            sender: whose turn it was.
            elapsed_s: what it took.
            now_s: monotonic time.
        """
        active = self._active_until_s
        if sender:
            active[sender] = now_s + ACTIVE_S
            active.move_to_end(sender)
        while active and next(iter(active.values())) <= now_s:
            active.popitem(last=False)
        has_others = len(active) > (sender in active)
        return min(PAUSE_FACTOR * elapsed_s, MAX_PAUSE_S) if has_others else 0.0
