from collections.abc import Awaitable, Callable

import pytest
from control_stand_in import ControlStandIn

from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.control.errors import Rejected, Unreachable

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


def test_reports_and_wakes_arrive(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        client = ControlClient(control.url, token=TOKEN)
        await client.report({"functions": {}})
        await client.wake({"functions": ["a"]})
        await client.close()
        assert control.loads == [{"functions": {}}]
        assert control.wakes == [["a"]]

    on_loop(tell)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_refusal_tells_its_status_and_reason(
    status: int, control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        control.status = status
        client = ControlClient(control.url, token=TOKEN)
        with pytest.raises(Rejected, match=f"status {status}: told to refuse") as caught:
            await client.wake({"functions": ["a"]})
        assert caught.value.status == status
        await client.close()

    on_loop(tell)


def test_a_control_plane_that_is_away_is_unreachable(
    control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        control.stop()
        client = ControlClient(control.url)
        with pytest.raises(Unreachable, match="/v1/load"):
            await client.report({})
        await client.close()

    on_loop(tell)


def test_a_control_plane_that_stalls_is_unreachable(
    control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        control.stall_s = 20.0
        client = ControlClient(control.url, token=TOKEN, timeouts=ControlTimeouts(call_s=0.2))
        with pytest.raises(Unreachable, match=r"no answer in 0\.2 s"):
            await client.report({})
        await client.close()

    on_loop(tell)
