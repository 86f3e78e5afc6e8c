"""The routers of a model: who gets a request, and who goes on when that router ends."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from tests.gateway.fake_router import FakeRouter, reply
from tests.gateway.test_front import A, System, tenant

from faasmoe_contracts.gateway_file import ModelEntry, RouterEntry
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.model_routes import ModelRoute, Reservation

MODEL = ModelEntry("m", "m", 100, tuple(RouterEntry(n, f"/run/{n}.sock") for n in "012"))


def route() -> ModelRoute:
    return ModelRoute(MODEL, front_token="secret", hold_timeout_s=1.0, demand=DemandReporter(None))


def socket_of(reservation: Reservation) -> str:
    address = reservation.choose()
    assert address is not None
    return address.path.stem


def test_requests_go_to_running_routers_with_the_fewest_tokens() -> None:
    routers = route()
    routers.set_running(["1", "2"])
    with routers.reserve(b"", 50) as first, routers.reserve(b"", 10) as second:
        busy, free = socket_of(first), socket_of(second)
        assert {busy, free} == {"1", "2"}
        with routers.reserve(b"", 10) as third:
            assert socket_of(third) == free
    with routers.reserve(b"", 1) as again:
        assert socket_of(again) == busy  # nothing is outstanding any more


def test_requests_wait_while_no_router_takes_them() -> None:
    routers = route()
    routers.set_running([])
    with routers.reserve(b"session", 1) as reserved:
        assert reserved.choose() is None  # one that is ending must not get it
        routers.set_running(["2"])
        assert socket_of(reserved) == "2"


def test_request_stays_while_its_router_runs() -> None:
    routers = route()
    with routers.reserve(b"session", 1) as reserved:
        before = socket_of(reserved)
        assert socket_of(reserved) == before
        routers.set_running([n for n in "012" if n != before])
        assert socket_of(reserved) != before


def test_request_of_a_router_that_dies_goes_to_another() -> None:
    async def work(folder: Path) -> None:
        system = System(folder, tenant(folder, "acme", A), answers=(reply(b"{}"),))
        routers = tuple(RouterEntry(n, str(folder / f"{n}.sock")) for n in ("gone", "here"))
        system.front._routes["a"] = moved = ModelRoute(
            ModelEntry("a", "org/a", 100, routers),
            front_token="secret",
            hold_timeout_s=30.0,
            demand=DemandReporter(None),
        )
        moved.set_running(["gone"])
        async with asyncio.timeout(120), FakeRouter(folder / "here.sock", reply(b"{}")) as here:
            call = asyncio.create_task(system.call({"model": "org/a"}, key="key-acme"))
            while not moved.waiting.n:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0.001)
            moved.set_running(["here"])
            assert (await call)[0] == 200
            assert len(here.requests) == 1

    with tempfile.TemporaryDirectory(prefix="mr-") as name:  # tmp_path may be too long
        asyncio.run(work(Path(name)))
