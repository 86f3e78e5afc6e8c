"""Attaching beside the event loop: frames of other functions are computed meanwhile.

Reading and verifying a block takes tens of milliseconds from the page cache and seconds from a
disk. It is done in a thread of its own, one function after the other; what the sandbox holds is
changed by the event loop alone.
"""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faasmoe_expert.server.sandbox import Sandbox
from faasmoe_expert.table import FunctionSpec


class Attaching:
    """Attaches the functions of one sandbox. Begins no thread before the first."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attach")

    async def attach(
        self, spec: FunctionSpec, *, store: Path, model_digest: str
    ) -> tuple[dict[str, Any], bool]:
        """Do what `Sandbox.attach` does, after the attachments that were begun before."""
        async with self._turn:
            held = self._sandbox.held(spec, model_digest)
            if held is not None:
                return held, False
            load = functools.partial(
                self._sandbox.load, spec, store=store, model_digest=model_digest
            )
            loaded = await asyncio.get_running_loop().run_in_executor(self._thread, load)
            return self._sandbox.put(loaded), True
