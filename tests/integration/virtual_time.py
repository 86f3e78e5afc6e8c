"""An event loop whose clock jumps to the next timer, for tests of when something happens."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Waits for nothing: a wait for a timer only advances the loop's time to it.

    For coroutines that wait for timers and for each other, not for sockets, threads or processes.
    """

    def __init__(self) -> None:
        selector = selectors.SelectSelector()
        super().__init__(selector)
        self._now_s = 0.0
        select = selector.select

        def advance(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            assert timeout is not None, "all tasks wait for each other"
            self._now_s += max(0.0, timeout)
            return select(0)

        selector.select = advance  # type: ignore[method-assign]

    def time(self) -> float:
        """Return the virtual time in seconds; it begins at 0."""
        return self._now_s


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
