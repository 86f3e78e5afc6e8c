"""How many requests of one sender an event loop works on at once, before they wait for others.

Requests that arrive together share the loop step by step: one that arrives after fifty others would
wait for a step of each before every step of its own. So a request takes a turn of its sender first;
those of one sender wait for each other, and for nobody else. With a `TurnPacing` a turn also costs
its sender a pause beside others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable

from faasmoe_gateway.turn_pacing import TurnPacing

TURNS_PER_SENDER = 2  # of the gateway, where a turn is a connection to the router


class Turn:
    """The turn of one request."""

    def __init__(self, turns: SenderTurns, sender: Hashable, now_s: float) -> None:
        self._turns: SenderTurns | None = turns
        self._sender = sender
        self._begun_s = now_s

    def release(self) -> None:
        """Let the sender's next request begin; idempotent."""
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.release_one(self._sender, self._begun_s)


class SenderTurns:
    """The turns of all senders, each in the order of its requests; belongs to one event loop.

    Args:
        n_per_sender: turns that a sender has at once.
        pacing: how long a turn that has ended is not passed on; None for not at all.
    """

    def __init__(self, *, n_per_sender: int = 1, pacing: TurnPacing | None = None) -> None:
        self._n_per_sender = n_per_sender
        self._pacing = pacing
        self._n_taken: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, deque[asyncio.Future[Turn]]] = {}

    def ask(self, sender: Hashable) -> asyncio.Future[Turn]:
        """Return the future of a turn, done if there is one; `give_up` ends what is not awaited."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Turn] = loop.create_future()
        n_taken = self._n_taken.get(sender, 0)
        if n_taken < self._n_per_sender:
            self._n_taken[sender] = n_taken + 1
            future.set_result(Turn(self, sender, loop.time()))
        else:
            self._waiting.setdefault(sender, deque()).append(future)
        return future

    def give_up(self, future: asyncio.Future[Turn]) -> None:
        """End a wait; a turn that has come is passed on."""
        if not future.cancel() and not future.cancelled():
            future.result().release()

    async def take(self, sender: Hashable) -> Turn:
        """Wait for a turn."""
        future = self.ask(sender)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.give_up(future)
            raise

    def release_one(self, sender: Hashable, begun_s: float) -> None:
        """Pass a turn on, perhaps after a pause; `Turn.release` calls this."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        pause_s = 0.0
        if self._pacing is not None:
            pause_s = self._pacing.pause_after(sender, now_s - begun_s, now_s)
        if pause_s:
            loop.call_later(pause_s, self._pass_on, sender)
        else:
            self._pass_on(sender)

    def _pass_on(self, sender: Hashable) -> None:
        waiting = self._waiting.get(sender, deque())
        while waiting:
            future = waiting.popleft()
            if not future.done():  # nor given up
                future.set_result(Turn(self, sender, asyncio.get_running_loop().time()))
                return
        self._waiting.pop(sender, None)
        self._n_taken[sender] -= 1
        if not self._n_taken[sender]:
            del self._n_taken[sender]
