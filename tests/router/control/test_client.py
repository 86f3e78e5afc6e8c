from collections.abc import Awaitable, Callable

import pytest
from fake_control import FakeControl

from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.errors import ControlRejected, ControlUnreachable

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


def test_reports_and_wakes_arrive(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        client = ControlClient(control.url, token=TOKEN)
        await client.report_load({"functions": {}})
        await client.request_activation({"functions": ["a"]})
        await client.close()
        assert control.load_reports == [{"functions": {}}]
        assert control.activation_requests == [["a"]]

    on_loop(scenario)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_refusal_tells_its_status_and_reason(
    status: int, control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.status = status
        client = ControlClient(control.url, token=TOKEN)
        with pytest.raises(ControlRejected, match=f"status {status}: told to refuse") as caught:
            await client.request_activation({"functions": ["a"]})
        assert caught.value.status == status
        await client.close()

    on_loop(scenario)


def test_a_control_plane_that_is_away_is_unreachable(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.stop()
        client = ControlClient(control.url)
        with pytest.raises(ControlUnreachable, match="/v1/load"):
            await client.report_load({})
        await client.close()

    on_loop(scenario)


def test_a_control_plane_that_stalls_is_unreachable(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.stall_s = 20.0
        client = ControlClient(control.url, token=TOKEN, timeouts=ControlTimeouts(request_s=0.2))
        with pytest.raises(ControlUnreachable, match=r"no answer in 0\.2 s"):
            await client.report_load({})
        await client.close()

    on_loop(scenario)
