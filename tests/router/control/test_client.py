from collections.abc import Awaitable, Callable

import pytest
from fake_control import FakeControl

from faasmoe_contracts.control_messages import ActivationRequest, LoadReport
from faasmoe_contracts.usage import ClusterTotals, UsageRecord, UsageReport
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.errors import ControlProtocolError, ControlRejected, ControlUnreachable

TOKEN = "secret"
REQUEST = ActivationRequest("r", ("a",), 0.0)
USAGE = UsageReport("a" * 32, 200.0, {"acme": UsageRecord(7)})
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


def test_sends_load_reports_and_activation_requests(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        client = ControlClient(control.url, token=TOKEN)
        await client.report_load(LoadReport("r"))
        await client.request_activation(REQUEST)
        await client.close()
        assert control.load_reports == [LoadReport("r").to_json()]
        assert control.activation_requests == [["a"]]

    on_loop(scenario)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_rejection_has_the_status_and_the_reason(
    status: int, control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.status = status
        client = ControlClient(control.url, token=TOKEN)
        with pytest.raises(
            ControlRejected, match=f"status {status}: rejected by the test"
        ) as caught:
            await client.request_activation(REQUEST)
        assert caught.value.status == status
        await client.close()

    on_loop(scenario)


def test_a_stopped_control_plane_is_unreachable(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.stop()
        client = ControlClient(control.url)
        with pytest.raises(ControlUnreachable, match="/v1/load"):
            await client.report_load(LoadReport("r"))
        await client.close()

    on_loop(scenario)


def test_a_control_plane_that_does_not_respond_is_unreachable(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.stall_s = 20.0
        client = ControlClient(control.url, token=TOKEN, timeouts=ControlTimeouts(request_s=0.2))
        with pytest.raises(ControlUnreachable, match=r"no response within 0\.2 s"):
            await client.report_load(LoadReport("r"))
        await client.close()

    on_loop(scenario)


def test_a_usage_report_returns_the_totals_over_all_routers(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.usage_totals = {"acme": {"prompt_tokens": 10}}
        client = ControlClient(control.url, token=TOKEN)
        assert await client.report_usage(USAGE) == ClusterTotals(90.0, {"acme": UsageRecord(10)})
        assert control.usage_reports == [USAGE.to_json()]
        await client.close()

    on_loop(scenario)


def test_invalid_totals_are_a_protocol_error(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.usage_totals = {"acme": {"prompt_tokens": -1}}
        client = ControlClient(control.url, token=TOKEN)
        with pytest.raises(ControlProtocolError, match=r"tenants\.acme\.prompt_tokens: got -1"):
            await client.report_usage(USAGE)
        await client.close()

    on_loop(scenario)
