"""Several models that share the memory and the sandboxes of one machine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from aiohttp import web
from fake_platform import (
    CLOCK_SPEED,
    DEADLINE_S,
    DIGEST,
    FakePlatform,
    error_response,
    eventually,
    fast_clock,
    make_model,
    routable_functions,
    running_controller,
)

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.machine_memory import MemoryPool
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.control.sandbox_pool import PooledModel, SandboxPool
from faasmoe_operator.plan.fleet import MemoryClaim, MemoryHolder
from faasmoe_operator.plan.router_memory import RouterMemory
from faasmoe_operator.platforms.base import ProcessSandboxTemplate
from faasmoe_operator.scaling import ScalingSettings

KEPT = ScalingSettings(initial_scale=0, window_s=3600, scale_to_zero_grace_period_s=3600)
"""Functions that stay until somebody else needs their memory."""
IDLE_S = 2.5 / CLOCK_SPEED


@dataclass(frozen=True)
class Machine:
    """Two models with two functions of size 1 each: a0, a1 and b0, b1."""

    memory: MemoryPool
    a: Controller
    b: Controller
    platform: FakePlatform


@asynccontextmanager
async def running_machine(limit: int, *, is_shared: bool = False) -> AsyncIterator[Machine]:
    platform = FakePlatform()
    memory = MemoryPool(limit, clock=fast_clock)
    models = {}
    for name in "ab":
        model = make_model(2, warm_pool=0, scaling=KEPT, prefix=name)
        store = ModelStore(Path(f"/stores/{name}"), DIGEST)
        models[name] = replace(model, name=name, store=store, shares_sandboxes=is_shared)
    pooled = {
        name: PooledModel(model.store.path, ProcessSandboxTemplate(1))
        for name, model in models.items()
    }
    async with (
        asyncio.timeout(DEADLINE_S),
        SandboxClient(token="t") as client,
        SandboxPool(platform, client, pooled, is_shared=is_shared, n_processors=1) as pool,
    ):
        shared = {name: memory.shared_by(name) for name in models}
        async with (
            running_controller(models["a"], pool.platform_of("a"), memory=shared["a"]) as a,
            running_controller(models["b"], pool.platform_of("b"), memory=shared["b"]) as b,
        ):
            memory.join("a", a.function_memory)
            memory.join("b", b.function_memory)
            yield Machine(memory, a, b, platform)
    await platform.close()


def has(controller: Controller, *functions: str) -> bool:
    return routable_functions(controller) == set(functions)


async def activate(controller: Controller, *functions: str) -> None:
    """Activate functions as a router does, again until they are there, and let them be idle."""
    while not set(functions) <= routable_functions(controller):
        controller.activate(functions)
        await asyncio.sleep(0.01)
    await asyncio.sleep(IDLE_S)


@pytest.mark.parametrize("is_shared", [False, True])
def test_least_recently_used_function_of_another_model_makes_room(is_shared: bool) -> None:
    async def work() -> None:
        async with running_machine(limit=2, is_shared=is_shared) as machine:
            await activate(machine.a, "a0")
            await activate(machine.b, "b0")
            await activate(machine.b, "b1")
            await eventually(lambda: has(machine.a) and has(machine.b, "b0", "b1"))
            await activate(machine.a, "a0")
            await eventually(lambda: has(machine.a, "a0") and has(machine.b, "b1"))

    asyncio.run(work())


def test_model_that_makes_room_leaves_the_processes_to_the_others() -> None:
    async def work() -> None:
        async with running_machine(limit=4, is_shared=True) as machine:
            await activate(machine.a, "a0", "a1")
            await activate(machine.b, "b0", "b1")
            servers = dict(machine.platform.servers)
            assert len(servers) == 2  # as many as a model needs
            assert [sorted(f[0] for f in s.functions) for s in servers.values()] == [["a", "b"]] * 2
            machine.a.function_memory.release()
            await eventually(lambda: not machine.a.fleet.sandboxes)
            assert has(machine.a)
            assert has(machine.b, "b0", "b1")
            await activate(machine.a, "a0")
            assert dict(machine.platform.servers) == servers
            changes = {name.partition(" ")[0] for s in servers.values() for name in s.calls}
            assert changes == {"PUT", "DELETE"}
            assert all("DELETE /stores/a" in server.calls for server in servers.values())

    asyncio.run(work())


def test_process_that_dies_is_replaced_for_every_model() -> None:
    async def work() -> None:
        async with running_machine(limit=4, is_shared=True) as machine:
            await activate(machine.a, "a0", "a1")
            await activate(machine.b, "b0", "b1")
            dead = next(iter(machine.platform.servers))
            await machine.platform.kill(dead)
            await eventually(lambda: len(machine.platform.servers) == 2)
            await eventually(lambda: has(machine.a, "a0", "a1") and has(machine.b, "b0", "b1"))

    asyncio.run(work())


def test_model_whose_functions_are_refused_keeps_the_others_sandboxes() -> None:
    async def refuse_a(request: web.Request) -> web.Response | None:
        is_attach = request.method == "PUT" and "/stores/a" in await request.text()
        return error_response(422, "bad_attachment") if is_attach else None

    async def work() -> None:
        async with running_machine(limit=4, is_shared=True) as machine:
            await activate(machine.b, "b0", "b1")
            servers = dict(machine.platform.servers)
            machine.platform.fault_handlers = [refuse_a] * 100
            for server in servers.values():
                server.fault_handler = refuse_a
            machine.a.activate(["a0"])
            await eventually(
                lambda: machine.platform.n_created >= 2 + 3
            )  # its own, again and again
            assert has(machine.b, "b0", "b1")
            assert servers.items() <= machine.platform.servers.items()
            assert len(machine.platform.servers) <= 2 + 1
            for server in servers.values():  # each was tried once
                assert server.calls.count("PUT a0") == 1

    asyncio.run(work())


def test_process_that_does_not_even_detach_is_ended_for_every_model() -> None:
    async def fail(_: web.Request) -> web.Response | None:
        raise web.HTTPInternalServerError

    async def work() -> None:
        async with running_machine(limit=4, is_shared=True) as machine:
            await activate(machine.a, "a0", "a1")
            await activate(machine.b, "b0", "b1")
            name, server = next(iter(machine.platform.servers.items()))
            server.fault_handler = fail
            await eventually(lambda: name not in machine.platform.servers)
            await eventually(lambda: has(machine.a, "a0", "a1") and has(machine.b, "b0", "b1"))

    asyncio.run(work())


def test_routers_and_functions_make_room_for_each_other() -> None:
    def router(name: str, *, is_running: bool, last_used: float) -> RouterMemory:
        return RouterMemory(name, 1, last_used, is_running, is_wanted=True)

    async def work() -> None:
        async with running_machine(limit=4) as machine:
            await activate(machine.a, "a0")
            await activate(machine.a, "a1")
            # It brings b0 and b1.
            starting = router("b/0", is_running=False, last_used=fast_clock())
            assert machine.memory.update_routers([starting]) == frozenset()
            await eventually(lambda: has(machine.a, "a1"))  # a0 was used before it
            await eventually(lambda: machine.memory.update_routers([starting]) == {"b/0"})
            idle = router("b/0", is_running=True, last_used=fast_clock() - 100)
            assert machine.memory.update_routers([idle]) == {"b/0"}
            machine.a.activate(["a0"])
            await eventually(lambda: machine.memory.update_routers([idle]) == frozenset())
            assert not has(machine.a, "a0", "a1")  # the router has not ended yet
            machine.memory.update_routers([])
            await eventually(lambda: has(machine.a, "a0", "a1"))

    asyncio.run(work())


def test_router_larger_than_the_limit_leaves_room_for_functions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        async with running_machine(limit=20) as machine:
            large = RouterMemory("a/0", 25, fast_clock(), is_running=True, is_wanted=True)
            for _ in range(2):
                assert machine.memory.update_routers([large]) == {"a/0"}
            await activate(machine.a, "a0", "a1")

    asyncio.run(work())
    assert [record.getMessage() for record in caplog.records if record.name.endswith("memory")] == [
        "router a/0 takes 25 bytes, the memory limit of all models is 20: it runs alone"
    ]


class Member:
    """A controller of which a test says what it holds.

    Attributes:
        holders: what it holds.
        missing: size of what a router will call beside that.
        content: what function f maps.
        n_releases: how often it was told to let all go.
        evicted: what it was told to detach.
        n_reconciles: how often it was told to plan anew.
    """

    def __init__(self, *holders: MemoryHolder) -> None:
        self.holders = list(holders)
        self.missing = 0
        self.content = ""
        self.n_releases = 0
        self.evicted: list[MemoryHolder] = []
        self.n_reconciles = 0

    def memory_holders(self) -> list[MemoryHolder]:
        return self.holders

    def held_bytes(self) -> int:
        return sum(holder.size_bytes for holder in self.holders)

    def missing_bytes(self, resident: Collection[str]) -> int:
        return 0 if self.content in resident else self.missing

    def resident_functions(self, contents: Collection[str]) -> frozenset[str]:
        return frozenset({"f"} if self.content in contents else ())

    def release(self) -> None:
        self.n_releases += 1

    def evict(self, holder: MemoryHolder) -> None:
        self.evicted.append(holder)

    def request_reconcile(self) -> None:
        self.n_reconciles += 1


def test_functions_of_a_model_are_idle_while_its_routers_are() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now)
    used = MemoryHolder(("s", "f"), 1, now)
    memory.join("a", Member(used))
    router = RouterMemory("a/0", 1, now, is_running=True, is_wanted=True)
    memory.update_routers([router])
    assert memory.view("b").others == (router.holder(now), used)
    idle = replace(router, last_used=now - 0.3)
    memory.update_routers([idle])
    assert memory.view("b").others == (replace(idle.holder(now), size_bytes=2),)  # as a whole
    assert memory.view("a").others == (idle.holder(now),)


def starting(name: str, *, size: int = 1, last_used: float = 100.0) -> RouterMemory:
    return RouterMemory(name, size, last_used, is_running=False, is_wanted=True, is_ready=False)


def test_memory_is_kept_for_functions_of_a_router_that_starts_until_they_are_there() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now)
    member = Member()
    member.missing = 6
    memory.join("a", member)
    memory.join("b", Member())
    router = starting("a/0")
    assert memory.update_routers([router]) == {"a/0"}
    running = replace(router, is_running=True)
    assert sum(h.size_bytes for h in memory.view("b").others) == 7
    assert sum(h.size_bytes for h in memory.view("a").others) == 1
    assert memory.update_routers([running, starting("b/0", size=4)]) == {"a/0"}
    assert memory.view("a").claims == ()  # what has started goes on before others start
    member.holders, member.missing = [MemoryHolder(("s", "f"), 4, now)], 2
    assert sum(h.size_bytes for h in memory.view("b").others) == 7
    member.holders = [MemoryHolder(("s", "f"), 6, now)]
    memory.update_routers([running])
    member.holders = []  # they went to zero afterwards
    assert memory.update_routers([running, starting("b/0", size=4)]) == {"a/0", "b/0"}


def test_models_that_map_the_same_hold_it_once() -> None:
    now = 100.0
    memory = MemoryPool(12, clock=lambda: now)
    first, second = Member(), Member()
    first.holders = [MemoryHolder(("s", "f"), 8, now, content="c")]
    second.missing = 8
    for name, member in {"a": first, "b": second}.items():
        memory.join(name, member)
    router = RouterMemory("a/0", 2, now, is_running=True, is_wanted=True)
    new = starting("b/0", size=2, last_used=now)
    assert memory.update_routers([router, new]) == {"a/0"}  # it would take 10 more
    first.content = second.content = "c"
    assert memory.update_routers([router, new]) == {"a/0", "b/0"}
    second.holders, second.missing = [MemoryHolder(("t", "f"), 8, now, content="c")], 0
    view = memory.view("b")
    assert [(h.key, h.size_bytes) for h in view.others if h.name == "f"] == [(("s", "f"), 4)]
    assert (view.own_extra_bytes, set(view.resident)) == (-4, {"f"})


def test_memory_is_kept_for_functions_for_a_while_only() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now)
    member = Member()
    member.missing = 6
    memory.join("a", member)
    router = starting("a/0")
    memory.update_routers([router])
    now += 1000.0
    running = replace(router, is_running=True, last_used=now)
    assert memory.update_routers([running, starting("b/0", size=9, last_used=now)]) == {
        *("a/0", "b/0")
    }


def test_of_models_in_use_that_lack_memory_the_first_gets_it() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now)
    members = {name: Member(MemoryHolder((name, "f"), 3, now)) for name in "ab"}
    for name, member in members.items():
        memory.join(name, member)
    memory.update_routers([starting("a/0")])
    first = replace(starting("a/0"), is_running=True)
    assert memory.update_routers([first, starting("b/0")]) == {"a/0", "b/0"}
    routers = [first, replace(starting("b/0"), is_running=True)]
    for name in "ab":
        memory.settle(name, [MemoryClaim(f"{name}2", 4, now)], [])
    memory.update_routers(routers)
    theirs = memory.view("a")
    assert theirs.claims == ()
    assert [h.is_evictable and h.is_idle for h in theirs.others if h.name == "f"] == [True]
    ours = memory.view("b")
    assert [(claim.name, claim.last_used) for claim in ours.claims] == [("a2", math.inf)]
    assert [h.is_evictable for h in ours.others if h.name == "f"] == [False]
    memory.settle("a", [], [])  # it has what it needs, and is called now
    assert [h.is_evictable for h in memory.view("b").others if h.name == "f"] == [True]


def test_router_that_does_not_become_ready_keeps_others_from_starting_for_a_while_only() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now, max_starting=1)
    first, second = starting("a/0"), starting("b/0")
    assert memory.update_routers([first, second]) == {"a/0"}
    slow = replace(first, is_running=True)
    assert memory.update_routers([slow, second]) == {"a/0"}
    now += 11.0
    slow, second = replace(slow, last_used=now), replace(second, last_used=now)
    assert memory.update_routers([slow, second]) == {"a/0", "b/0"}


def test_functions_go_once_the_router_that_makes_room_has_had_its_last_request() -> None:
    now = 100.0
    memory = MemoryPool(10, clock=lambda: now)
    member = Member(MemoryHolder(("s", "f"), 4, 50.0))
    memory.join("a", member)
    idle = RouterMemory("a/0", 4, 50.0, is_running=True, is_wanted=True)
    new = starting("b/0", size=7)
    assert memory.update_routers([idle, new]) == frozenset()
    assert all(holder.is_leaving for holder in memory.view("b").others)
    assert (member.n_releases, member.evicted) == (0, [])
    memory.update_routers([replace(idle, is_ready=False), new])
    assert member.n_releases == 1
    assert memory.update_routers([replace(idle, is_running=False, is_wanted=False), new]) == set()
    member.holders = []
    assert memory.update_routers([new]) == {"b/0"}


def test_claims_are_seen_by_others_and_told_when_memory_is_free() -> None:
    memory = MemoryPool(10, clock=lambda: 0.0)
    first = Member(MemoryHolder(("s", "f"), 8, 0.0))
    second = Member()
    memory.join("a", first)
    memory.join("b", second)
    claim = MemoryClaim("g", 8, 1.0)
    memory.settle("b", [claim], first.holders)
    assert first.evicted == first.holders
    assert memory.view("a").claims == (claim,)
    assert memory.view("b").claims == ()
    memory.settle("a", [], [])
    assert second.n_reconciles == 0
    first.holders = []
    memory.settle("a", [], [])
    assert second.n_reconciles == 1
