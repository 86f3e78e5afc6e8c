"""Signal handling: the first signal cancels the main coroutine, the second exits at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any

TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_until_signal(coroutine: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine and return its exit status, or 128 + N if signal N cancelled it.

    A second signal exits without cleanup; children notice the death of their parent
    (`faasmoe_contracts.parent_death`) and exit too.
    """
    task = asyncio.create_task(coroutine)
    received: list[int] = []

    def on_signal(number: int) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]
