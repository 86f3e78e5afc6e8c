"""The HTTP server: uvicorn, but it ends quietly and lets no answer hang.

uvicorn closes its listeners at shutdown, waits for running answers and then cuts them. Here it goes
on to listen while they finish, and says that it ends (`ending.py`); those that take too long are
ended first, each with an error that its client can read. And it ends by returning, not by the
signal it got, so that what comes after it still runs.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from faasmoe_router.ending import Ending

DRAIN_S = 20.0
LAST_WORDS_S = 2.0  # for the errors that end what took too long
CUT_S = 3  # together less than the 30 s after which Kubernetes kills


class Server(uvicorn.Server):
    """Serves an app until SIGTERM, SIGINT or `should_exit`.

    Args:
        app: the ASGI app.
        host: address to listen at.
        port: port to listen at.
        end_running: ends the answers that still run `drain_s` after the end was asked for.
        drain_s: how long answers may go on.
    """

    def __init__(
        self,
        app: Any,
        *,
        end_running: Callable[[], None],
        host: str = "127.0.0.1",
        port: int = 0,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._ending = Ending(app)
        config = uvicorn.Config(
            self._ending,
            host=host,
            port=port,
            ws="none",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=CUT_S,
        )
        super().__init__(config)
        self._end_running = end_running
        self._drain_s = drain_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the wish to end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse work, wait for the running answers, end those that take too long, then close."""
        self._ending.begin()
        if not await self._ending.wait_until_quiet(self._drain_s):
            self._end_running()
            await self._ending.wait_until_quiet(LAST_WORDS_S)
        await super().shutdown(sockets)
