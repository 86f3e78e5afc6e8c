"""The work that a request costs before it is generated, done off the event loop and fairly.

Reading a body into a request, rendering its chat template, tokenizing and compiling its grammar all
run here: on few threads, so that the engine keeps its cores, in turns between tenants by weight.
Whoever cancels the wait, because the client has left, gives up its turn; work that has begun runs
to its end, and only then frees its slot. Small work is done at once: a thread would cost more.

Before that, small requests take turns on the event loop (`turns`), which end here.

`HeldBytes` bounds the memory of bodies that are being read and prepared, by tenant.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TypeVar

from faasmoe_gateway.sender_turns import Turn
from faasmoe_router.api.fair_slots import FairSlots
from faasmoe_router.errors import TenantQueueFull
from faasmoe_router.tenants.service import Caller

MAX_CONCURRENT_PREPARATIONS = 2  # long texts must not take all cores from the engine
MAX_WAITING_PREPARATIONS = 512
INLINE_BYTES = 4096  # of text or JSON that the event loop deals with itself
MAX_HELD_BYTES = 64 << 20
BODY_BYTES_FACTOR = 2  # a body and the strings parsed from it
VALUE_BYTES = 100  # of Python objects per JSON value

T = TypeVar("T")

current_turn: ContextVar[Turn | None] = ContextVar("current_turn", default=None)
"""The turn on the event loop of the request that is being handled."""


def release_turn() -> None:
    """End the turn of the request that is being handled, if it has one."""
    turn = current_turn.get()
    if turn is not None:
        turn.release()


class PreparationQueue:
    """Runs preparations on threads; an async context manager, bound to one event loop.

    Args:
        n_threads: preparations that run at once.
        max_waiting: preparations that may wait.
        is_shared: whether there are several tenants.
    """

    def __init__(
        self,
        *,
        n_threads: int = MAX_CONCURRENT_PREPARATIONS,
        max_waiting: int = MAX_WAITING_PREPARATIONS,
        is_shared: bool = False,
    ) -> None:
        self._slots = FairSlots(n_slots=n_threads, max_waiting=max_waiting, is_shared=is_shared)
        self._executor = ThreadPoolExecutor(n_threads, thread_name_prefix="prepare")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, caller: Caller, work: Callable[[], T], *, size_bytes: int) -> T:
        """Return the result of `work`, done in its caller's turn.

        Args:
            caller: whose turn it takes.
            work: computes the result, on a thread unless it is small.
            size_bytes: bytes of text or JSON that it deals with.

        Raises:
            TenantQueueFull: too many of the caller's requests wait already.
        """
        if size_bytes <= INLINE_BYTES:
            return work()
        return await self.run_in_turn(caller, work)

    async def run_in_turn(
        self, caller: Caller, work: Callable[[], T], *, timeout_s: float | None = None
    ) -> T:
        """As `run`, on a thread whatever its size; raises TimeoutError.

        Args:
            caller: whose turn it takes.
            work: computes the result.
            timeout_s: how long it may run; it cannot be interrupted, and keeps its slot meanwhile.
        """
        release_turn()
        await self._wait_for_turn(caller)
        started_s = time.monotonic()
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(functools.partial(self._on_done, caller.tenant, started_s))
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(future)

    async def _wait_for_turn(self, caller: Caller) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._slots.push(caller.tenant, turn, weight=caller.weight)
        self._start_next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._slots.remove(caller.tenant, turn)
            else:  # it was this one's turn just now
                self._release(caller.tenant, 0.0)
            raise

    def _on_done(self, tenant: str, started_s: float, future: asyncio.Future[T]) -> None:
        if not future.cancelled():
            future.exception()  # retrieved here, because its waiter may have left
        self._release(tenant, time.monotonic() - started_s)

    def _release(self, tenant: str, elapsed_s: float) -> None:
        self._slots.release(tenant, elapsed_s)
        self._start_next()

    def _start_next(self) -> None:
        while (started := self._slots.pop()) is not None:
            turn = started[1]
            assert isinstance(turn, asyncio.Future)
            turn.set_result(None)


class HeldBytes:
    """Bounds the memory of the bodies that are held, in bytes of Python objects.

    Args:
        max_bytes: capacity; each active tenant has its part of it, by weight, at least one body.
    """

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: dict[str, tuple[float, dict[object, int]]] = {}  # weight, bytes by body

    def n_bytes(self) -> int:
        """Return the bytes that are held."""
        return sum(sum(bodies.values()) for _, bodies in self._held.values())

    def hold(self, caller: Caller, body: object, n_bytes: int) -> None:
        """Set the bytes of one body of a caller; raises TenantQueueFull beyond its part."""
        _, bodies = self._held.setdefault(caller.tenant, (caller.weight, {}))
        others = sum(size for key, size in bodies.items() if key is not body)
        if others and others + n_bytes > self._part(caller):
            raise TenantQueueFull(
                f"{others} bytes of your requests are being read already, as much as may be"
            )
        bodies[body] = n_bytes

    def release(self, caller: Caller, body: object) -> None:
        """Stop counting a body."""
        _, bodies = self._held.get(caller.tenant, (0.0, {}))
        bodies.pop(body, None)
        if not bodies:
            self._held.pop(caller.tenant, None)

    def _part(self, caller: Caller) -> float:
        weights = sum(weight for weight, _ in self._held.values())
        return self._max_bytes * caller.weight / weights


def held_bytes(body_bytes: int, n_values: int) -> int:
    """Return the bytes that a body and what is parsed from it take, at most."""
    return BODY_BYTES_FACTOR * body_bytes + VALUE_BYTES * n_values
