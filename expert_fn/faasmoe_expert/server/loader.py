"""Attaches functions in a background thread, while the event loop computes frames of others."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_expert.errors import AttachRefused
from faasmoe_expert.server.attachments import Attachment
from faasmoe_expert.server.runtime import LoadedFunction, SandboxRuntime


class BackgroundLoader:
    """Attaches functions in a background thread, started with the first attachment."""

    def __init__(self, runtime: SandboxRuntime) -> None:
        self._runtime = runtime
        self._lock = asyncio.Lock()
        self._n_detached: Counter[Path] = Counter()  # how often all of a store were detached
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="attach")

    def attach(
        self, spec: FunctionSpec, *, store: Path, model_digest: str
    ) -> Coroutine[Any, Any, tuple[dict[str, Any], bool]]:
        """Attach a function as `SandboxRuntime.attach` does, after earlier attachments finish.

        Raises AttachRefused if all functions of its store are detached meanwhile.
        """
        return self._attach(Attachment(spec, store, model_digest), self._n_detached[store])

    def attach_all(
        self, attachments: Sequence[Attachment]
    ) -> Coroutine[Any, Any, list[dict[str, Any] | Exception]]:
        """Attach functions; return the status of each, or why it is refused.

        As many as possible are loaded with one turn of the thread, which costs as much as to load
        a function.
        """
        return self._attach_all(attachments, [self._n_detached[a.store] for a in attachments])

    def detach_all(self, store: Path) -> list[str]:
        """Detach every function of a store; return their ids.

        Those that are being attached from it are refused: none of them comes later.
        """
        self._n_detached[store] += 1
        return self._runtime.detach_all(store)

    async def _attach(self, attachment: Attachment, n_detached: int) -> tuple[dict[str, Any], bool]:
        async with self._lock:
            self._check_wanted(attachment, n_detached)
            attached = self._runtime.find_attached(attachment.spec, attachment.model_digest)
            if attached is not None:
                return attached, False
            load = functools.partial(self._runtime.load, attachment.spec, **attachment.source)
            loaded = await asyncio.get_running_loop().run_in_executor(self._executor, load)
            return self._add(loaded, attachment, n_detached), True

    async def _attach_all(
        self, attachments: Sequence[Attachment], n_detached: Sequence[int]
    ) -> list[dict[str, Any] | Exception]:
        results: list[dict[str, Any] | Exception] = []
        async with self._lock:
            while len(results) < len(attachments):
                rest = attachments[len(results) :]
                results += await self._attach_distinct(
                    _distinct(rest, self._runtime.n_loadable), n_detached[len(results) :]
                )
        return results

    async def _attach_distinct(
        self, attachments: Sequence[Attachment], n_detached: Sequence[int]
    ) -> list[dict[str, Any] | Exception]:
        """Attach functions with different ids, for all of which there is room."""
        results: dict[str, dict[str, Any] | Exception] = {}
        missing: list[Attachment] = []
        n_before = {a.spec.id: n for a, n in zip(attachments, n_detached, strict=False)}
        for attachment in attachments:
            try:
                self._check_wanted(attachment, n_before[attachment.spec.id])
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
                name = attachment.spec.id
                if isinstance(function, Exception):
                    results[name] = function
                    continue
                try:
                    results[name] = self._add(function, attachment, n_before[name])
                except AttachRefused as error:
                    results[name] = error
        return [results[attachment.spec.id] for attachment in attachments]

    def _add(
        self, loaded: LoadedFunction, attachment: Attachment, n_detached: int
    ) -> dict[str, Any]:
        """Attach a loaded function; raises AttachRefused if it is no longer wanted."""
        try:
            self._check_wanted(attachment, n_detached)
        except AttachRefused:
            self._runtime.discard(loaded)
            raise
        return self._runtime.add(loaded)

    def _check_wanted(self, attachment: Attachment, n_detached: int) -> None:
        if self._n_detached[attachment.store] != n_detached:
            raise AttachRefused(
                f"store: all functions of {attachment.store} were detached meanwhile",
                field="store",
            )


def _distinct(attachments: Sequence[Attachment], max_size: int) -> Sequence[Attachment]:
    """Return the first attachments until an id is repeated: one or more, `max_size` at most."""
    found: dict[str, Attachment] = {}
    for attachment in attachments[: max(1, max_size)]:
        if attachment.spec.id in found:
            break
        found[attachment.spec.id] = attachment
    return tuple(found.values())
