"""Sandboxes that several models take from one pool, each seeing its own alone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace

import pytest

from faasmoe_operator.control.sandbox_pool import SandboxPool
from faasmoe_operator.errors import FaasmoeError, PlatformError
from faasmoe_operator.platforms.base import ProcessSandboxTemplate, Sandbox, SandboxEvent
from faasmoe_operator.platforms.registry import SandboxRegistry

TEMPLATE = ProcessSandboxTemplate(capacity=8)
OTHER = ProcessSandboxTemplate(capacity=1)
TIMEOUT_S = 120.0


class FakePlatform:
    """Sandboxes that are ready at once.

    Attributes:
        n_created: sandboxes created so far.
        failures: how many creations fail before one succeeds.
    """

    def __init__(self) -> None:
        self.registry = SandboxRegistry()
        self.n_created = 0
        self.failures = 0
        self._numbers = itertools.count()

    def add(self, template: ProcessSandboxTemplate = TEMPLATE) -> Sandbox:
        name = f"s{next(self._numbers)}"
        sandbox = Sandbox(name, f"127.0.0.1:{name}", True, template.digest)
        self.registry.upsert(sandbox)
        return sandbox

    async def create(self, template: ProcessSandboxTemplate) -> Sandbox:
        if self.failures:
            self.failures -= 1
            raise PlatformError("no process")
        self.n_created += 1
        return self.add(template)

    async def delete(self, sandbox_id: str, *, at_once: bool = False) -> None:
        self.registry.remove(sandbox_id, reason="deleted")

    async def list(self) -> tuple[Sandbox, ...]:
        return self.registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        return self.registry.watch()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  # of state that has no event
            await asyncio.sleep(0)


def ids(sandboxes: Collection[Sandbox]) -> list[str]:
    return [sandbox.id for sandbox in sandboxes]


def test_generic_sandboxes_are_kept_ready_for_whichever_model_comes_first() -> None:
    async def work() -> None:
        platform = FakePlatform()
        async with SandboxPool(platform, {TEMPLATE: 2}) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 2)
            assert pool.size == 2
            first, second = pool.platform_of("a"), pool.platform_of("b")
            taken = [await first.create(TEMPLATE), await second.create(TEMPLATE)]
            assert ids(taken) == ["s0", "s1"]
            assert ids(await first.list()) == ["s0"]
            assert ids(await second.list()) == ["s1"]
            await until(lambda: pool.n_generic == 2)  # filled up again
            assert platform.n_created == 4

    asyncio.run(work())


def test_sandbox_of_another_template_is_created() -> None:
    async def work() -> None:
        platform = FakePlatform()
        async with SandboxPool(platform, {TEMPLATE: 1}) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 1)
            sandbox = await pool.platform_of("a").create(OTHER)
            assert sandbox.template_hash == OTHER.digest
            assert pool.n_generic == 1

    asyncio.run(work())


def test_sandbox_that_a_model_gives_up_ends_and_no_other_model_gets_it() -> None:
    async def work() -> None:
        platform = FakePlatform()
        async with SandboxPool(platform, {}) as pool:
            first, second = pool.platform_of("a"), pool.platform_of("b")
            sandbox = await first.create(TEMPLATE)
            await first.delete(sandbox.id)
            assert await first.list() == ()
            assert (await second.create(TEMPLATE)).id != sandbox.id

    asyncio.run(work())


def test_model_is_told_of_its_sandboxes_and_of_no_others() -> None:
    async def work() -> None:
        platform = FakePlatform()
        async with SandboxPool(platform, {}) as pool:
            first, second = pool.platform_of("a"), pool.platform_of("b")
            events = first.watch()
            await second.create(TEMPLATE)
            sandbox = await first.create(TEMPLATE)
            async with asyncio.timeout(TIMEOUT_S):
                assert await anext(events) == SandboxEvent("changed", sandbox)
                changed = replace(sandbox, ready=False)
                platform.registry.upsert(changed)
                assert await anext(events) == SandboxEvent("changed", changed)
                platform.registry.remove(sandbox.id, reason="exited with status 1")
                expected = SandboxEvent("deleted", changed, "exited with status 1")
                assert await anext(events) == expected

    asyncio.run(work())


def test_sandboxes_of_an_earlier_run_go_to_the_models_whose_functions_they_hold() -> None:
    async def work() -> None:
        platform = FakePlatform()
        held = {"s0": ["f1", "f2"], "s1": ["g1"], "s2": [], "s3": [], "s4": ["unknown"]}
        for _ in range(6):
            platform.add()

        async def list_functions(address: str) -> Collection[str]:
            name = address.rpartition(":")[2]
            if name not in held:
                raise FaasmoeError("it does not respond")
            return held[name]

        async with SandboxPool(platform, {TEMPLATE: 1}) as pool:
            await pool.adopt(list_functions, {"f1": "a", "f2": "a", "g1": "b"})
            first, second = pool.platform_of("a"), pool.platform_of("b")
            assert ids(await first.list()) == ["s0"]
            assert ids(await second.list()) == ["s1"]
            # One empty one is kept; what holds nothing known, or is silent, is deleted.
            assert ids(platform.registry.all()) == ["s0", "s1", "s2"]
            assert pool.n_generic == 1

    asyncio.run(work())


def test_failed_creation_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.sandbox_pool.CREATE_BACKOFF_S", (0.0,))

    async def work() -> None:
        platform = FakePlatform()
        platform.failures = 3
        async with SandboxPool(platform, {TEMPLATE: 1}) as pool:
            pool.start_filling()
            await until(lambda: pool.n_generic == 1)
            assert platform.n_created == 1

    asyncio.run(work())


def test_model_that_gets_no_sandbox_is_told_why() -> None:
    async def work() -> None:
        platform = FakePlatform()
        platform.failures = 1
        async with SandboxPool(platform, {}) as pool:
            with pytest.raises(PlatformError, match="no process"):
                await pool.platform_of("a").create(TEMPLATE)

    asyncio.run(work())
