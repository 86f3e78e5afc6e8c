"""Processes that several models take from one pool, each seeing its own sandboxes alone."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.sandbox_client import AttachedFunction, SandboxListing
from faasmoe_operator.control.sandbox_pool import PooledModel, SandboxPool
from faasmoe_operator.errors import FaasmoeError, PlatformError
from faasmoe_operator.platforms.base import ProcessSandboxTemplate, Sandbox, SandboxEvent
from faasmoe_operator.platforms.registry import SandboxRegistry

TEMPLATE = ProcessSandboxTemplate(capacity=8)
OTHER = ProcessSandboxTemplate(capacity=1, threads=2)
TIMEOUT_S = 120.0
NAMES = "abcd"


class FakePlatform:
    """Sandboxes that are ready at once.

    Attributes:
        n_created: sandboxes created so far.
        failures: how many creations fail before one succeeds.
        is_ready: whether new ones are.
        deleted: sandboxes that were deleted, and whether at once.
    """

    def __init__(self) -> None:
        self.registry = SandboxRegistry()
        self.n_created = 0
        self.failures = 0
        self.is_ready = True
        self.deleted: list[tuple[str, bool]] = []
        self._numbers = itertools.count()

    def add(self, template: ProcessSandboxTemplate = TEMPLATE) -> Sandbox:
        name = f"s{next(self._numbers)}"
        sandbox = Sandbox(name, f"127.0.0.1:{name}", self.is_ready, template.digest)
        self.registry.upsert(sandbox)
        return sandbox

    async def create(self, template: ProcessSandboxTemplate) -> Sandbox:
        if self.failures:
            self.failures -= 1
            raise PlatformError("no process")
        self.n_created += 1
        return self.add(template)

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        self.deleted.append((sandbox_id, at_once))
        self.registry.remove(sandbox_id, reason="deleted")

    async def list(self) -> tuple[Sandbox, ...]:
        return self.registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        return self.registry.watch()


@dataclass
class FakeApi:
    """What sandboxes hold, by the names of stores.

    Attributes:
        held: the stores by sandbox.
        silent: sandboxes that do not answer.
        limit_bytes: of each sandbox.
        calls: sandboxes and stores whose functions were detached.
        gate: what a detach waits for.
    """

    held: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    silent: set[str] = field(default_factory=set)
    limit_bytes: int | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def list(self, address: str) -> SandboxListing:
        stores = self.held[self._answering(address)]
        spec = FunctionSpec("f", (0,), (0,))
        functions = (AttachedFunction(spec, "", 1, store=Path(f"/{store}")) for store in stores)
        return SandboxListing(tuple(functions), self.limit_bytes)

    async def detach_all(self, address: str, store: Path) -> None:
        if self.gate is not None:
            await self.gate.wait()
        name = self._answering(address)
        self.calls.append((name, store.name))
        self.held[name] = [found for found in self.held[name] if found != store.name]

    def _answering(self, address: str) -> str:
        name = address.rpartition(":")[2]
        if name in self.silent:
            raise FaasmoeError("it does not respond")
        return name


@dataclass
class Scene:
    """A pool with its platform and what sandboxes hold."""

    platform: FakePlatform = field(default_factory=FakePlatform)
    api: FakeApi = field(default_factory=FakeApi)

    def pool(self, *, warm: int = 0, is_shared: bool = True, n_processors: int = 2) -> SandboxPool:
        models = {name: PooledModel(Path(f"/{name}"), TEMPLATE, warm) for name in NAMES}
        return SandboxPool(
            self.platform, self.api, models, is_shared=is_shared, n_processors=n_processors
        )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  # of state that has no event
            await asyncio.sleep(0)


def ids(sandboxes: Collection[Sandbox]) -> list[str]:
    return [sandbox.id for sandbox in sandboxes]


@pytest.mark.parametrize("is_shared", [False, True])
def test_generic_sandboxes_are_kept_ready_for_whichever_model_comes_first(is_shared: bool) -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(warm=2, is_shared=is_shared) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 2)
            assert pool.size == 2
            first, second = pool.platform_of("a"), pool.platform_of("b")
            taken = [await first.create(TEMPLATE), await second.create(TEMPLATE)]
            assert ids(taken) == ["s0", "s1"]
            assert ids(await first.list()) == ["s0"]
            assert ids(await second.list()) == ["s1"]
            await until(lambda: pool.n_generic == 2)  # filled up again
            assert scene.platform.n_created == 4

    asyncio.run(work())


def test_models_share_processes_once_there_are_as_many_as_suit_the_machine() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(n_processors=2) as pool:
            first, second, third = (pool.platform_of(name) for name in "abc")
            for _ in range(3):
                await first.create(TEMPLATE)
            taken = [await second.create(TEMPLATE) for _ in range(2)]
            assert ids(taken) == ["s0", "s1"]
            assert {sandbox.template_hash for sandbox in taken} == {TEMPLATE.digest}
            assert ids([await third.create(TEMPLATE)]) == ["s2"]  # the fewest models
            assert scene.platform.n_created == pool.n_processes == 3
            assert [pool.n_models(name) for name in ("s0", "s1", "s2", "s9")] == [2, 2, 2, 1]
            assert ids(await second.list()) == ["s0", "s1"]

    asyncio.run(work())


def test_models_that_start_together_wait_for_the_first_process_rather_than_have_their_own() -> None:
    async def work() -> None:
        scene = Scene()
        scene.platform.is_ready = False
        async with scene.pool(n_processors=1) as pool:
            taking = [
                asyncio.create_task(pool.platform_of(name).create(TEMPLATE)) for name in "abc"
            ]
            await until(lambda: taking[0].done())
            (sandbox,) = scene.platform.registry.all()
            scene.platform.registry.upsert(replace(sandbox, ready=True))
            assert ids(await asyncio.gather(*taking)) == ["s0"] * 3
            assert scene.platform.n_created == 1

    asyncio.run(work())


def test_process_that_ends_before_it_was_ready_keeps_nobody_waiting() -> None:
    async def work() -> None:
        scene = Scene()
        scene.platform.is_ready = False
        async with scene.pool(n_processors=1) as pool:
            await pool.platform_of("a").create(TEMPLATE)
            taking = asyncio.create_task(pool.platform_of("b").create(TEMPLATE))
            await asyncio.sleep(0)
            await pool.platform_of("a").delete("s0", failed=True)
            assert (await taking).id == "s1"

    asyncio.run(work())


def test_processes_with_a_memory_limit_are_not_shared() -> None:
    async def work() -> None:
        scene = Scene()
        scene.api.limit_bytes = 100
        async with scene.pool(n_processors=1) as pool:
            taken = [await pool.platform_of(name).create(TEMPLATE) for name in "abc"]
            assert ids(taken) == ["s0", "s1", "s2"]

    asyncio.run(work())


def test_process_of_other_threads_is_created() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(warm=1, n_processors=1) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 1)
            sandbox = await pool.platform_of("a").create(OTHER)
            assert sandbox.template_hash == OTHER.digest
            assert pool.n_generic == 1
            # Only how many functions a share holds may differ.
            small = replace(TEMPLATE, capacity=1)
            shared = [
                await pool.platform_of("b").create(small),
                await pool.platform_of("c").create(TEMPLATE),
            ]
            assert shared[0].id == shared[1].id != sandbox.id
            assert [s.template_hash for s in shared] == [small.digest, TEMPLATE.digest]

    asyncio.run(work())


def test_separate_sandbox_that_a_model_gives_up_ends_and_no_other_model_gets_it() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(is_shared=False, n_processors=1) as pool:
            first, second = pool.platform_of("a"), pool.platform_of("b")
            sandbox = await first.create(TEMPLATE)
            assert sandbox.template_hash == TEMPLATE.digest
            other = await second.create(TEMPLATE)
            await first.delete(sandbox.id)
            assert await first.list() == ()
            assert ids(await second.list()) == [other.id]
            assert (await second.create(TEMPLATE)).id not in (sandbox.id, other.id)
            assert scene.api.calls == []

    asyncio.run(work())


def test_share_that_a_model_gives_up_is_detached_and_the_process_ends_with_the_last() -> None:
    async def work() -> None:
        scene = Scene()
        scene.api.gate = asyncio.Event()
        async with scene.pool(n_processors=1) as pool:
            first, second = pool.platform_of("a"), pool.platform_of("b")
            sandbox = await first.create(TEMPLATE)
            await second.create(TEMPLATE)
            events = first.watch()
            assert (await anext(events)).kind == "changed"
            await first.delete(sandbox.id, at_once=True)
            # Its memory counts until the functions are gone, and it is taken by nobody meanwhile.
            assert [s.ready for s in await first.list()] == [False]
            await first.delete(sandbox.id)  # once
            scene.api.gate.set()
            await until(lambda: not pool.registry_of("a").all())
            gone = await anext(events)
            assert (gone.kind, gone.reason) == ("deleted", "its functions were detached")
            assert scene.api.calls == [("s0", "a")]
            assert [s.ready for s in await second.list()] == [True]
            assert ids([await first.create(TEMPLATE)]) == ["s0"]
            await second.delete(sandbox.id)
            await until(lambda: not pool.registry_of("b").all())
            await first.delete(sandbox.id, at_once=True)
            assert scene.platform.deleted == [("s0", True)]
            assert pool.n_processes == 0

    asyncio.run(work())


def test_models_that_leave_together_end_the_process() -> None:
    async def work() -> None:
        scene = Scene()
        scene.api.gate = asyncio.Event()
        async with scene.pool(n_processors=1) as pool:
            for name in "ab":
                await pool.platform_of(name).create(TEMPLATE)
            for name in "ab":
                await pool.platform_of(name).delete("s0", at_once=True)
            assert scene.platform.deleted == [("s0", True)]
            scene.api.silent.add("s0")
            scene.api.gate.set()
            assert (await pool.platform_of("a").create(TEMPLATE)).id == "s1"
            assert scene.platform.deleted == [("s0", True)]

    asyncio.run(work())


def test_process_that_does_not_detach_is_killed_and_lost_for_every_model() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(n_processors=1) as pool:
            for name in "abc":
                await pool.platform_of(name).create(TEMPLATE)
            scene.api.silent.add("s0")
            await pool.platform_of("a").delete("s0", failed=True)
            await until(lambda: not any(pool.registry_of(name).all() for name in "abc"))
            assert scene.platform.deleted == [("s0", True)]
            assert (await pool.platform_of("b").create(TEMPLATE)).id == "s1"

    asyncio.run(work())


def test_detach_that_hangs_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.sandbox_pool.DETACH_AT_ONCE_TIMEOUT_S", 0.0)

    async def work() -> None:
        scene = Scene()
        scene.api.gate = asyncio.Event()
        async with scene.pool(n_processors=1) as pool:
            for name in "ab":
                await pool.platform_of(name).create(TEMPLATE)
            await pool.platform_of("a").delete("s0", at_once=True)
            await until(lambda: not pool.registry_of("b").all())
            assert scene.platform.deleted == [("s0", True)]

    asyncio.run(work())


def test_process_that_failed_for_a_model_is_left_to_the_others() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(n_processors=1) as pool:
            first, second, third = (pool.platform_of(name) for name in "abc")
            await first.create(TEMPLATE)
            await second.create(TEMPLATE)
            await first.delete("s0", failed=True)
            await until(lambda: not pool.registry_of("a").all())
            assert ids(await second.list()) == ["s0"]
            for _ in range(3):  # it gets another process each time, and leaves none
                sandbox = await first.create(TEMPLATE)
                assert sandbox.id != "s0"
                await first.delete(sandbox.id, failed=True)
            assert ids(scene.platform.registry.all()) == ["s0"]
            assert (await third.create(TEMPLATE)).id == "s0"

    asyncio.run(work())


def test_model_is_told_of_its_sandboxes_and_of_no_others() -> None:
    async def work() -> None:
        scene = Scene()
        registry = scene.platform.registry
        async with scene.pool(is_shared=False) as pool:
            first, second = pool.platform_of("a"), pool.platform_of("b")
            events = first.watch()
            await second.create(TEMPLATE)
            sandbox = await first.create(TEMPLATE)
            async with asyncio.timeout(TIMEOUT_S):
                assert await anext(events) == SandboxEvent("changed", sandbox)
                changed = replace(sandbox, ready=False)
                registry.upsert(changed)
                assert await anext(events) == SandboxEvent("changed", changed)
                registry.remove(sandbox.id, reason="exited with status 1")
                expected = SandboxEvent("deleted", changed, "exited with status 1")
                assert await anext(events) == expected

    asyncio.run(work())


def test_every_model_is_told_of_a_process_that_dies() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(n_processors=1) as pool:
            events = []
            for name in "ab":
                await pool.platform_of(name).create(TEMPLATE)
                events.append(pool.platform_of(name).watch())
            async with asyncio.timeout(TIMEOUT_S):
                for each in events:
                    await anext(each)
                scene.platform.registry.remove("s0", reason="exited with status -9")
                for each in events:
                    event = await anext(each)
                    assert (event.kind, event.reason) == ("deleted", "exited with status -9")

    asyncio.run(work())


def test_sandboxes_of_an_earlier_run_go_to_the_models_whose_functions_they_hold() -> None:
    async def work() -> None:
        scene = Scene()
        held = ["a", "b", "", "", "unknown", "a b", "silent"]
        for stores in held:
            sandbox = scene.platform.add()
            scene.api.held[sandbox.id] = stores.split()
        scene.api.silent.add("s6")
        async with scene.pool(warm=1, is_shared=False) as pool:
            await pool.adopt()
            assert ids(await pool.platform_of("a").list()) == ["s0"]
            assert ids(await pool.platform_of("b").list()) == ["s1"]
            # One empty one is kept; what holds nothing known, or is silent, is deleted.
            assert ids(scene.platform.registry.all()) == ["s0", "s1", "s2"]
            assert pool.n_generic == 1

    asyncio.run(work())


def test_shared_processes_of_an_earlier_run_go_to_all_whose_functions_they_hold() -> None:
    async def work() -> None:
        scene = Scene()
        async with scene.pool(warm=1, n_processors=1) as earlier:
            for name in "ab":
                await earlier.platform_of(name).create(TEMPLATE)
        shared = scene.platform.registry.get("s0")
        assert shared is not None
        scene.api.held["s0"] = ["a", "b", "unknown"]
        for name, stores in {"s1": ["a"], "s2": [], "s3": [], "s4": ["unknown"]}.items():
            scene.platform.registry.upsert(replace(shared, id=name, address=f"127.0.0.1:{name}"))
            scene.api.held[name] = stores
        async with scene.pool(warm=1, n_processors=1) as pool:
            await pool.adopt()
            assert ids(await pool.platform_of("a").list()) == ["s0", "s1"]
            assert ids(await pool.platform_of("b").list()) == ["s0"]
            assert [s.template_hash for s in await pool.platform_of("b").list()] == [
                TEMPLATE.digest
            ]
            # Nor does anything come that an earlier run was attaching for others.
            detached = {name: {s for n, s in scene.api.calls if n == name} for name in ("s0", "s1")}
            assert detached == {"s0": {"unknown", "c", "d"}, "s1": {"b", "c", "d"}}
            assert ids(scene.platform.registry.all()) == ["s0", "s1", "s2"]
            assert (await pool.platform_of("c").create(TEMPLATE)).id == "s1"  # known to be shared

    asyncio.run(work())


def test_failed_creation_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.sandbox_pool.CREATE_BACKOFF_S", (0.0,))

    async def work() -> None:
        scene = Scene()
        scene.platform.failures = 3
        async with scene.pool(warm=1) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 1)
            assert scene.platform.n_created == 1

    asyncio.run(work())


def test_model_that_gets_no_sandbox_is_told_why() -> None:
    async def work() -> None:
        scene = Scene()
        scene.platform.failures = 1
        async with scene.pool() as pool:
            with pytest.raises(PlatformError, match="no process"):
                await pool.platform_of("a").create(TEMPLATE)
            await pool.platform_of("b").create(TEMPLATE)

    asyncio.run(work())
