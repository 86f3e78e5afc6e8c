"""Sandboxes of one platform as a pool that several models take from.

A process holds functions of several models: each of them has a share of it, which its controller
sees as a sandbox of its own, through a `Platform` of its own. A model has at most one share of a
process. When it gives a share up, its functions are detached; with the last share the process ends.
A process that does not detach them in time is killed, and is then lost for every model.

Without sharing, a process becomes the model's that takes it first, and ends with that. So it is
also where functions have a memory limit for each process, which cannot be divided among models.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Never, Protocol, Self

from faasmoe_contracts.backoff import Backoff
from faasmoe_operator.aio import ChangeNotifier, TaskSet
from faasmoe_operator.control.sandbox_client import SandboxListing
from faasmoe_operator.errors import FaasmoeError, PlatformError
from faasmoe_operator.plan.sandbox_sharing import (
    SharedProcess,
    choose_process,
    n_suitable_processes,
)
from faasmoe_operator.platforms.base import (
    Platform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
)
from faasmoe_operator.platforms.registry import SandboxRegistry

CREATE_BACKOFF_S = (0.0, 1.0, 5.0, 30.0)
DETACH_TIMEOUT_S = 15.0  # as three listings: a process that computes a large frame answers late
DETACH_AT_ONCE_TIMEOUT_S = 5.0  # where others wait for the memory
LEARN_INTERVAL_S = 1.0
SHARED_CAPACITY = 1 << 20
"""Of a process that models share; how many functions a share holds, its model's plan decides."""

logger = logging.getLogger(__name__)


class SandboxApi(Protocol):
    """What the pool asks of sandboxes; SandboxClient has it. Raises FaasmoeError."""

    async def list(self, address: str) -> SandboxListing:
        """Return what a sandbox holds."""
        ...

    async def detach_all(self, address: str, store: Path) -> None:
        """Detach all functions of a store, those that are being attached included."""
        ...


@dataclass(frozen=True, slots=True)
class PooledModel:
    """A model that takes sandboxes from a pool.

    Attributes:
        store: what its functions are attached from; no other model's are.
        template: template of its sandboxes.
        warm_pool: how many generic sandboxes it asks for.
    """

    store: Path
    template: ProcessSandboxTemplate
    warm_pool: int = 0


class SandboxPool:
    """The processes of a platform, each shared by models or generic; an async context manager.

    Args:
        platform: runs the processes.
        api: asks processes what they hold, and detaches functions.
        models: the models by name.
        is_shared: whether models share processes.
        n_processors: processors of the machine; by default those that this process may use.
    """

    def __init__(
        self,
        platform: Platform[ProcessSandboxTemplate],
        api: SandboxApi,
        models: Mapping[str, PooledModel],
        *,
        is_shared: bool = True,
        n_processors: int | None = None,
    ) -> None:
        self._platform = platform
        self._api = api
        self._models = models
        self._is_shared = is_shared
        self._n_processors = n_processors or len(os.sched_getaffinity(0))
        self._sizes = self._pool_sizes()
        self._shares: dict[str, dict[str, str]] = {}
        """By process and model: digest of the model's template."""
        self._detaching: set[tuple[str, str]] = set()  # processes and models
        self._failed_for: dict[str, set[str]] = defaultdict(set)
        self._ending: set[str] = set()
        self._generic: dict[str, str] = {}  # digest of the template by process
        self._creating: Counter[str] = Counter()
        self._is_limited: dict[str, bool] = {}  # whether its processes have a limit, by digest
        self._taking: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._registries: dict[str, SandboxRegistry] = defaultdict(SandboxRegistry)
        self._changed = ChangeNotifier()
        self._n_changes = 0
        self._backoff = Backoff(CREATE_BACKOFF_S)
        self._tasks = TaskSet()

    @property
    def n_processes(self) -> int:
        """Number of processes that models have shares of, and of generic ones."""
        return len(self._shares) + len(self._generic)

    @property
    def n_generic(self) -> int:
        """Number of processes of which no model has a share."""
        return len(self._generic)

    @property
    def size(self) -> int:
        """Number of generic processes that it keeps ready."""
        return sum(self._sizes.values())

    @property
    def n_sharing(self) -> int:
        """Number of models that share processes at present; 1 if each has its own."""
        if not self._is_shared:
            return 1
        return max(1, len({model for shares in self._shares.values() for model in shares}))

    def n_models(self, sandbox_id: str) -> int:
        """Return how many models share a process."""
        return max(1, len(self._shares.get(sandbox_id, ())))

    def platform_of(self, model: str) -> PooledPlatform:
        """Return the platform of one model's controller."""
        return PooledPlatform(self, model)

    async def adopt(self) -> None:
        """Take over the processes of an earlier run; delete those that are of no use.

        A model gets a share of each process that holds functions from its store. Functions from
        stores of no model are detached.
        """
        sandboxes = await self._platform.list()
        await asyncio.gather(*map(self._adopt, sandboxes))
        await self._sync()

    async def __aenter__(self) -> Self:
        """Begin to follow the platform."""
        self._tasks.start(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop following the platform; the processes keep running."""
        await self._tasks.cancel_all()

    def start_filling(self) -> None:
        """Begin to keep generic processes ready, once those of an earlier run are adopted."""
        self._tasks.start(self._keep_filled())

    async def take(self, model: str, template: ProcessSandboxTemplate) -> Sandbox:
        """Return a sandbox that holds no function of the model yet; raises PlatformError."""
        of_process = self._process_template(template)
        async with self._taking[of_process.digest]:
            name = await self._find_shared(model, of_process)
            if name is None:
                sandbox = await self._take_generic(of_process.digest)
                if sandbox is None:
                    sandbox = await self._platform.create(of_process)
                name = sandbox.id
            self._shares.setdefault(name, {})[model] = template.digest
        await self._sync()
        self._notify()
        taken = self._registries[model].get(name)
        if taken is None:
            raise PlatformError(f"sandbox {name} exited at once")
        return taken

    async def delete(
        self, model: str, sandbox_id: str, *, at_once: bool = False, failed: bool = False
    ) -> None:
        """Start to end a model's share of a process, and the process with its last share.

        Args:
            model: the model.
            sandbox_id: the process.
            at_once: whether it gets no time for calls in flight.
            failed: whether it has failed for the model, which then gets no share of it again. The
                others find out themselves: what fails may be the model's store. One that has never
                been ready has failed for all.
        """
        shares = self._shares.get(sandbox_id, {})
        if model not in shares or (sandbox_id, model) in self._detaching:
            return
        if failed:
            self._failed_for[sandbox_id].add(model)
        sandbox = next((s for s in await self._platform.list() if s.id == sandbox_id), None)
        others = [m for m in shares if m != model and (sandbox_id, m) not in self._detaching]
        if sandbox is None or not others or not sandbox.ready:
            await self._end(sandbox_id, at_once=at_once)
            return
        self._detaching.add((sandbox_id, model))
        await self._sync()
        timeout_s = DETACH_AT_ONCE_TIMEOUT_S if at_once else DETACH_TIMEOUT_S
        self._tasks.start(self._detach(model, sandbox, timeout_s=timeout_s))

    def registry_of(self, model: str) -> SandboxRegistry:
        """Return one model's sandboxes."""
        return self._registries[model]

    async def _detach(self, model: str, sandbox: Sandbox, *, timeout_s: float) -> None:
        """Detach a model's functions, which ends its share; kill a process that does not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._api.detach_all(sandbox.address, self._models[model].store)
        except (FaasmoeError, TimeoutError) as error:
            if sandbox.id in self._shares:
                reason = str(error) or f"no answer within {timeout_s:g} s"
                text = "sandbox %s did not detach the functions of %s and is killed: %s"
                logger.warning(text, sandbox.id, model, reason)
                await self._end(sandbox.id, at_once=True)
            return
        self._detaching.discard((sandbox.id, model))
        self._shares.get(sandbox.id, {}).pop(model, None)
        self._registries[model].remove(sandbox.id, reason="its functions were detached")
        self._notify()

    async def _end(self, sandbox_id: str, *, at_once: bool) -> None:
        self._ending.add(sandbox_id)
        await self._platform.delete(sandbox_id, at_once=at_once)
        await self._sync()

    async def _find_shared(self, model: str, template: ProcessSandboxTemplate) -> str | None:
        """Return the process of which a model gets a share; None if it gets another process."""
        if not self._is_shared:
            return None
        n_suitable = n_suitable_processes(self._n_processors, template.threads)
        while True:
            n_changes = self._n_changes
            processes = await self._processes_in_use(template.digest)
            chosen = choose_process(processes, model, n_suitable=n_suitable)
            if chosen is None or template.digest in self._is_limited:
                return None if self._is_limited.get(template.digest) else chosen
            # The first process will tell once it is ready.
            await self._changed.wait_for(lambda n=n_changes: self._n_changes != n)  # type: ignore[misc]

    async def _processes_in_use(self, digest: str) -> Sequence[SharedProcess]:
        return [
            SharedProcess(
                sandbox.id,
                frozenset(self._shares[sandbox.id]),
                frozenset(self._failed_for.get(sandbox.id, ())),
            )
            for sandbox in await self._platform.list()
            if sandbox.template_hash == digest
            and sandbox.id in self._shares
            and sandbox.id not in self._ending
        ]

    def _process_template(self, template: ProcessSandboxTemplate) -> ProcessSandboxTemplate:
        """Return the template of processes for a model's sandboxes."""
        return replace(template, capacity=SHARED_CAPACITY) if self._is_shared else template

    def _pool_sizes(self) -> dict[ProcessSandboxTemplate, int]:
        """Return how many generic processes to keep: the most that one of the models wants."""
        sizes: dict[ProcessSandboxTemplate, int] = {}
        for model in self._models.values():
            template = self._process_template(model.template)
            sizes[template] = max(sizes.get(template, 0), model.warm_pool)
        return {template: size for template, size in sizes.items() if size}

    async def _adopt(self, sandbox: Sandbox) -> None:
        try:
            listing = await self._api.list(sandbox.address)
            stores = {function.store for function in listing.functions}
            owners = [name for name, model in self._models.items() if model.store in stores]
            if self._is_shared and owners:
                known = {model.store for model in self._models.values()}
                # What an earlier run was attaching when it was killed does not come any more.
                for store in filter(
                    None, (stores | known) - {self._models[m].store for m in owners}
                ):
                    await self._api.detach_all(sandbox.address, store)
        except FaasmoeError as error:
            logger.warning("sandbox %s is deleted: %s", sandbox.id, error)
            await self._platform.delete(sandbox.id)
            return
        self._is_limited.setdefault(sandbox.template_hash, listing.memory_limit_bytes is not None)
        if owners and (self._is_shared or len(stores) == 1):
            self._shares[sandbox.id] = {m: self._digest_of_share(sandbox, m) for m in owners}
        elif not stores and self._n_missing(sandbox.template_hash) > 0:
            self._generic[sandbox.id] = sandbox.template_hash
        else:
            await self._platform.delete(sandbox.id)

    def _digest_of_share(self, sandbox: Sandbox, model: str) -> str:
        """Return the digest that a model's adopted share has: another one if it is outdated."""
        template = self._models[model].template
        is_current = self._process_template(template).digest == sandbox.template_hash
        return template.digest if is_current else sandbox.template_hash

    async def _take_generic(self, digest: str) -> Sandbox | None:
        """Return a generic process, a ready one if there is any; None if there is none."""
        listed = [s for s in await self._platform.list() if self._generic.get(s.id) == digest]
        sandbox = max(listed, key=lambda s: s.ready, default=None)
        if sandbox is not None:
            del self._generic[sandbox.id]
        return sandbox

    async def _watch(self) -> None:
        async for event in self._platform.watch():
            reason = event.reason if event.kind == "deleted" else ""
            await self._sync(**{event.sandbox.id: reason} if reason else {})
            is_known = event.sandbox.template_hash in self._is_limited
            if self._is_shared and event.sandbox.ready and not is_known:
                self._tasks.start(self._learn_limit(event.sandbox))
            self._notify()

    async def _learn_limit(self, sandbox: Sandbox) -> None:
        """Ask a process whether the functions of its template have a memory limit."""
        while sandbox.template_hash not in self._is_limited and await self._is_listed(sandbox):
            try:
                listing = await self._api.list(sandbox.address)
            except FaasmoeError as error:
                logger.info("sandbox %s did not tell its limit: %s", sandbox.id, error)
                await asyncio.sleep(LEARN_INTERVAL_S)
            else:
                is_limited = listing.memory_limit_bytes is not None
                self._is_limited[sandbox.template_hash] = is_limited
                self._notify()

    async def _is_listed(self, sandbox: Sandbox) -> bool:
        return any(listed.id == sandbox.id for listed in await self._platform.list())

    async def _sync(self, **reasons: str) -> None:
        """Update the models' sandboxes; `reasons` says why processes have ended, by id."""
        listed = {sandbox.id: sandbox for sandbox in await self._platform.list()}
        for name in [name for name in self._shares if name not in listed]:
            self._forget(name, reason=reasons.get(name, "unknown"))
        for name in [name for name in self._generic if name not in listed]:
            del self._generic[name]
        for name, shares in self._shares.items():
            for model, digest in shares.items():
                seen = self._as_seen(listed[name], model, digest)
                if self._registries[model].get(name) != seen:
                    self._registries[model].upsert(seen)

    def _notify(self) -> None:
        self._n_changes += 1
        self._changed.notify()

    def _forget(self, sandbox_id: str, *, reason: str) -> None:
        """Forget a process that has ended, for every model that had a share of it."""
        for model in self._shares.pop(sandbox_id):
            self._registries[model].remove(sandbox_id, reason=reason)
            self._detaching.discard((sandbox_id, model))
        self._failed_for.pop(sandbox_id, None)
        self._ending.discard(sandbox_id)

    def _as_seen(self, sandbox: Sandbox, model: str, digest: str) -> Sandbox:
        """Return a process as a model sees it: of the model's own template."""
        is_detaching = (sandbox.id, model) in self._detaching
        if sandbox.template_hash == digest and not is_detaching:
            return sandbox
        return replace(sandbox, template_hash=digest, ready=sandbox.ready and not is_detaching)

    async def _keep_filled(self) -> Never:
        templates = {template.digest: template for template in self._sizes}
        while True:
            for digest, template in templates.items():
                for _ in range(self._n_missing(digest)):
                    self._creating[digest] += 1
                    self._tasks.start(self._create(template))
            await self._changed.wait_for(lambda: any(map(self._n_missing, templates)))

    def _n_missing(self, digest: str) -> int:
        """Return how many generic processes are to be created of a template."""
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
            self._notify()


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
        """Take a share of a process, a generic one or a new one; raises PlatformError."""
        return await self.pool.take(self.model, template)

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        """Start the deletion of a sandbox; does nothing if it does not exist."""
        await self.pool.delete(self.model, sandbox_id, at_once=at_once, failed=failed)

    async def list(self) -> tuple[Sandbox, ...]:
        """Return the model's sandboxes, terminating ones included, oldest first."""
        return self.pool.registry_of(self.model).all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every sandbox that the model has at this call, then changes, without end."""
        return self.pool.registry_of(self.model).watch()
