"""How many requests of one sender an event loop works on at once, before they wait for others.

Requests that arrive together share the loop step by step: one that arrives after fifty others would
wait for a step of each before every step of its own. So a request takes a turn of its sender first;
those of one sender wait for each other, and for nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable

TURNS_PER_SENDER = 2  # of the gateway, where a turn is a connection to the router


class Turn:
    """The turn of one request."""

    def __init__(self, turns: SenderTurns, sender: Hashable) -> None:
        self._turns: SenderTurns | None = turns
        self._sender = sender

    def release(self) -> None:
        """Let the sender's next request begin; idempotent."""
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.release_one(self._sender)


class SenderTurns:
    """The turns of all senders, each in the order of its requests; belongs to one event loop.

    Args:
        n_per_sender: turns that a sender has at once.
    """

    def __init__(self, *, n_per_sender: int = 1) -> None:
        self._n_per_sender = n_per_sender
        self._n_taken: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, deque[asyncio.Future[Turn]]] = {}

    def ask(self, sender: Hashable) -> asyncio.Future[Turn]:
        """Return the future of a turn, done if there is one; `give_up` ends what is not awaited."""
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        n_taken = self._n_taken.get(sender, 0)
        if n_taken < self._n_per_sender:
            self._n_taken[sender] = n_taken + 1
            future.set_result(Turn(self, sender))
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

    def release_one(self, sender: Hashable) -> None:
        """Pass a turn on; `Turn.release` calls this."""
        waiting = self._waiting.get(sender, deque())
        while waiting:
            future = waiting.popleft()
            if not future.done():  # nor given up
                future.set_result(Turn(self, sender))
                return
        self._waiting.pop(sender, None)
        self._n_taken[sender] -= 1
        if not self._n_taken[sender]:
            del self._n_taken[sender]
