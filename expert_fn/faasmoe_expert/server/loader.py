"""Attaches functions in a background thread, while the event loop computes frames of others."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_expert.errors import AttachRefused
from faasmoe_expert.server.attachments import Attachment
from faasmoe_expert.server.runtime import SandboxRuntime


class BackgroundLoader:
    """Attaches functions in a background thread, started with the first attachment."""

    def __init__(self, runtime: SandboxRuntime) -> None:
        self._runtime = runtime
        self._lock = asyncio.Lock()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="attach")

    async def attach(
        self, spec: FunctionSpec, *, store: Path, model_digest: str
    ) -> tuple[dict[str, Any], bool]:
        """Attach a function as `SandboxRuntime.attach` does, after earlier attachments finish."""
        async with self._lock:
            attached = self._runtime.find_attached(spec, model_digest)
            if attached is not None:
                return attached, False
            load = functools.partial(
                self._runtime.load, spec, store=store, model_digest=model_digest
            )
            loaded = await asyncio.get_running_loop().run_in_executor(self._executor, load)
            return self._runtime.add(loaded), True

    async def attach_all(
        self, attachments: Sequence[Attachment]
    ) -> list[dict[str, Any] | Exception]:
        """Attach functions; return the status of each, or why it is refused.

        As many as possible are loaded with one turn of the thread, which costs as much as to load
        a function.
        """
        results: list[dict[str, Any] | Exception] = []
        async with self._lock:
            while len(results) < len(attachments):
                rest = attachments[len(results) :]
                results += await self._attach_distinct(_distinct(rest, self._runtime.n_loadable))
        return results

    async def _attach_distinct(
        self, attachments: Sequence[Attachment]
    ) -> list[dict[str, Any] | Exception]:
        """Attach functions with different ids, for all of which there is room."""
        results: dict[str, dict[str, Any] | Exception] = {}
        missing: list[Attachment] = []
        for attachment in attachments:
            try:
                found = self._runtime.find_attached(attachment.spec, attachment.model_digest)
            except AttachRefused as error:
                results[attachment.spec.id] = error
                continue
            if found is None:
                missing.append(attachment)
            else:
                results[attachment.spec.id] = found
        if missing:
            loop = asyncio.get_running_loop()
            loaded = await loop.run_in_executor(self._executor, self._runtime.load_all, missing)
            for attachment, function in zip(missing, loaded, strict=True):
                results[attachment.spec.id] = (
                    function if isinstance(function, Exception) else self._runtime.add(function)
                )
        return [results[attachment.spec.id] for attachment in attachments]


def _distinct(attachments: Sequence[Attachment], max_size: int) -> Sequence[Attachment]:
    """Return the first attachments until an id is repeated: one or more, `max_size` at most."""
    found: dict[str, Attachment] = {}
    for attachment in attachments[: max(1, max_size)]:
        if attachment.spec.id in found:
            break
        found[attachment.spec.id] = attachment
    return tuple(found.values())
