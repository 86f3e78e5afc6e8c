"""Runs kopf: in a thread and an event loop of its own, begun anew if it ends.

kopf takes its loop for its own (when it ends, it cancels every task that it finds) and parses
whole lists at once; the control API, whose wakes are to be answered in milliseconds, is not to
share a loop with that. Events cross over one by one, into the loop that everything else lives in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

import kopf

from faasmoe_operator.kube.handlers import Deliver, make_registry, make_settings
from faasmoe_operator.kube.kinds import Kind, Object

logger = logging.getLogger(__name__)

RESTART_S = 5.0
STOP_TIMEOUT_S = 10.0


class Watcher:
    """Watches objects, until cancelled.

    Args:
        kinds: what to watch.
        namespaces: where; empty for everywhere.
        deliver: takes each event, in the loop that `run` is called in.
        interrupted: called when the watches have ended, before they begin anew.
        restart_s: pause before they do.
    """

    def __init__(
        self,
        *,
        kinds: Sequence[Kind],
        namespaces: Sequence[str],
        deliver: Deliver,
        interrupted: Callable[[], None],
        restart_s: float = RESTART_S,
    ) -> None:
        self._kinds, self._namespaces = tuple(kinds), tuple(namespaces)
        self._deliver, self._interrupted = deliver, interrupted
        self._restart_s = restart_s

    async def run(self) -> None:
        """Watch until cancelled; a kopf that fails is started again after a pause."""
        while True:
            await self._run_once()
            logger.error("the watches have ended; they begin anew in %g s", self._restart_s)
            await asyncio.sleep(self._restart_s)
            self._interrupted()

    async def _run_once(self) -> None:
        loop, stop, ended = asyncio.get_running_loop(), threading.Event(), asyncio.Event()

        def work() -> None:
            try:
                asyncio.run(self._operator(loop, stop))
            except Exception:
                logger.exception("kopf has failed")
            finally:
                _call(loop, ended.set)

        threading.Thread(target=work, name="kopf", daemon=True).start()
        try:
            await ended.wait()
        finally:
            stop.set()
            await asyncio.wait_for(ended.wait(), STOP_TIMEOUT_S)

    async def _operator(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        def deliver(kind: Kind, type_: str | None, obj: Object) -> None:
            _call(loop, lambda: self._deliver(kind, type_, obj))

        try:
            await kopf.operator(
                registry=make_registry(self._kinds, deliver),
                settings=make_settings(self._kinds),
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
                standalone=True,
                stop_flag=stop,
            )
        finally:
            stop.set()  # kopf waits for it in a thread that its loop waits for


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Have a function called in a loop, unless that has ended."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        logger.debug("an event came after the end")
