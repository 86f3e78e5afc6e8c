"""Sandboxes of one platform as a pool that several models take from.

A generic sandbox can attach any model's functions. It becomes the model's that takes it first and
ends with that: a sandbox that has held one model's weights is never handed to another. Each model's
controller sees its own sandboxes alone, through a `Platform` of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Never, Self

from faasmoe_contracts.backoff import Backoff
from faasmoe_operator.aio import ChangeNotifier, TaskSet
from faasmoe_operator.errors import FaasmoeError, PlatformError
from faasmoe_operator.platforms.base import (
    Platform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
)
from faasmoe_operator.platforms.registry import SandboxRegistry

CREATE_BACKOFF_S = (0.0, 1.0, 5.0, 30.0)

logger = logging.getLogger(__name__)

ListFunctions = Callable[[str], Awaitable[Collection[str]]]
"""Returns the ids of the functions in the sandbox at an address; raises FaasmoeError."""


class SandboxPool:
    """The sandboxes of a platform, each of one model or of none yet; an async context manager.

    Args:
        platform: runs the sandboxes.
        sizes: how many generic sandboxes to keep ready, by template.
    """

    def __init__(
        self,
        platform: Platform[ProcessSandboxTemplate],
        sizes: Mapping[ProcessSandboxTemplate, int],
    ) -> None:
        self._platform = platform
        self._sizes = {template: size for template, size in sizes.items() if size}
        self._owners: dict[str, str] = {}  # model by sandbox
        self._generic: dict[str, str] = {}  # digest of the template by sandbox
        self._creating: Counter[str] = Counter()
        self._registries: dict[str, SandboxRegistry] = defaultdict(SandboxRegistry)
        self._changed = ChangeNotifier()
        self._backoff = Backoff(CREATE_BACKOFF_S)
        self._tasks = TaskSet()

    @property
    def n_generic(self) -> int:
        """Number of sandboxes that are no model's."""
        return len(self._generic)

    @property
    def size(self) -> int:
        """Number of generic sandboxes that it keeps ready."""
        return sum(self._sizes.values())

    def platform_of(self, model: str) -> PooledPlatform:
        """Return the platform of one model's controller."""
        return PooledPlatform(self, model)

    async def adopt(self, list_functions: ListFunctions, models: Mapping[str, str]) -> None:
        """Take over the sandboxes of an earlier run; delete those that are of no use.

        Args:
            list_functions: asks a sandbox what it holds.
            models: the model of each function.
        """
        sandboxes = await self._platform.list()
        await asyncio.gather(*(self._adopt(s, list_functions, models) for s in sandboxes))
        await self._sync()

    async def __aenter__(self) -> Self:
        """Begin to follow the platform."""
        self._tasks.start(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop following the platform; the sandboxes keep running."""
        await self._tasks.cancel_all()

    def start_filling(self) -> None:
        """Begin to keep generic sandboxes ready, once those of an earlier run are adopted."""
        self._tasks.start(self._keep_filled())

    async def take(self, model: str, template: ProcessSandboxTemplate) -> Sandbox:
        """Return a sandbox that is the model's from now on; raises PlatformError."""
        sandbox = await self._take_generic(template.digest)
        if sandbox is None:
            sandbox = await self._platform.create(template)
        self._owners[sandbox.id] = model
        await self._sync()
        self._changed.notify()
        if self._registries[model].get(sandbox.id) is None:
            raise PlatformError(f"sandbox {sandbox.id} exited at once")
        return sandbox

    async def delete(self, sandbox_id: str, *, at_once: bool = False) -> None:
        """Start the deletion of a sandbox."""
        await self._platform.delete(sandbox_id, at_once=at_once)
        await self._sync()

    def registry_of(self, model: str) -> SandboxRegistry:
        """Return one model's sandboxes."""
        return self._registries[model]

    async def _adopt(
        self, sandbox: Sandbox, list_functions: ListFunctions, models: Mapping[str, str]
    ) -> None:
        try:
            functions = await list_functions(sandbox.address)
        except FaasmoeError as error:
            logger.warning("sandbox %s is deleted: %s", sandbox.id, error)
            await self._platform.delete(sandbox.id)
            return
        owners = {models.get(function) for function in functions}
        owner = owners.pop() if len(owners) == 1 else None
        if owner is not None:
            self._owners[sandbox.id] = owner
        elif not functions and self._n_missing(sandbox.template_hash) > 0:
            self._generic[sandbox.id] = sandbox.template_hash
        else:
            await self._platform.delete(sandbox.id)

    async def _take_generic(self, digest: str) -> Sandbox | None:
        """Return a generic sandbox, a ready one if there is any; None if there is none."""
        listed = [s for s in await self._platform.list() if self._generic.get(s.id) == digest]
        sandbox = max(listed, key=lambda s: s.ready, default=None)
        if sandbox is not None:
            del self._generic[sandbox.id]
        return sandbox

    async def _watch(self) -> None:
        async for event in self._platform.watch():
            reason = event.reason if event.kind == "deleted" else ""
            await self._sync(**{event.sandbox.id: reason} if reason else {})
            self._changed.notify()

    async def _sync(self, **reasons: str) -> None:
        """Update the models' sandboxes; `reasons` says why sandboxes were deleted, by id."""
        listed = {sandbox.id: sandbox for sandbox in await self._platform.list()}
        for name in [name for name in self._owners if name not in listed]:
            registry = self._registries[self._owners.pop(name)]
            registry.remove(name, reason=reasons.get(name, "unknown"))
        for name in [name for name in self._generic if name not in listed]:
            del self._generic[name]
        for name, model in self._owners.items():
            if self._registries[model].get(name) != listed[name]:
                self._registries[model].upsert(listed[name])

    async def _keep_filled(self) -> Never:
        templates = {template.digest: template for template in self._sizes}
        while True:
            for digest, template in templates.items():
                for _ in range(self._n_missing(digest)):
                    self._creating[digest] += 1
                    self._tasks.start(self._create(template))
            await self._changed.wait_for(lambda: any(map(self._n_missing, templates)))

    def _n_missing(self, digest: str) -> int:
        """Return how many generic sandboxes are to be created of a template."""
        size = next((n for t, n in self._sizes.items() if t.digest == digest), 0)
        have = sum(found == digest for found in self._generic.values())
        return max(0, size - have - self._creating[digest])

    async def _create(self, template: ProcessSandboxTemplate) -> None:
        digest = template.digest
        try:
            sandbox = await self._platform.create(template)
        except PlatformError as error:
            delay_s = self._backoff.next_delay_s()
            logger.warning("no generic sandbox was created: %s; again in %g s", error, delay_s)
            await asyncio.sleep(delay_s)
        else:
            self._backoff.reset()
            self._generic[sandbox.id] = digest
        finally:
            self._creating[digest] -= 1
            self._changed.notify()


@dataclass(frozen=True, slots=True)
class PooledPlatform:
    """One model's sandboxes of a pool; a Platform.

    Attributes:
        pool: the pool.
        model: the model.
    """

    pool: SandboxPool
    model: str

    async def create(self, template: ProcessSandboxTemplate) -> Sandbox:
        """Take a generic sandbox, or create one; raises PlatformError."""
        return await self.pool.take(self.model, template)

    async def delete(self, sandbox_id: str, *, at_once: bool = False) -> None:
        """Start the deletion of a sandbox; does nothing if it does not exist."""
        await self.pool.delete(sandbox_id, at_once=at_once)

    async def list(self) -> tuple[Sandbox, ...]:
        """Return the model's sandboxes, terminating ones included, oldest first."""
        return self.pool.registry_of(self.model).all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every sandbox that the model has at this call, then changes, without end."""
        return self.pool.registry_of(self.model).watch()
