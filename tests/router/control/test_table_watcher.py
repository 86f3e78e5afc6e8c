"""The table stream of a server that disconnects, stalls, sends invalid messages and restarts."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from fake_control import ABORT, END_OF_STREAM, FakeControl
from prometheus_client import CollectorRegistry

from faasmoe_contracts.routing_table import RoutingTable, RoutingTableError
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.control.table_watcher import TableWatcher

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]
STREAM_IDLE_S = 1.5


class FakeDispatcher:
    """Accepts tables; rejects other models and unknown functions, as the dispatcher does."""

    def __init__(self, digest: str) -> None:
        self._digest = digest
        self.addresses: dict[str, tuple[str, ...]] = {}
        self.versions: list[int] = []

    def replace_table(self, table: RoutingTable) -> None:
        if table.model_digest != self._digest:
            raise RoutingTableError("model_digest: another model")
        self.addresses = {entry.spec.id: entry.addresses for entry in table.functions}
        self.versions.append(table.version)

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        if not addresses.keys() <= self.addresses.keys():
            raise RoutingTableError("functions: unknown")
        self.addresses |= addresses
        self.versions.append(version)


class WatcherHarness:
    """A running watcher and counters of its callbacks."""

    def __init__(self, control: FakeControl, *, token: str = TOKEN) -> None:
        self.consumer = FakeDispatcher(control.table.model_digest)
        self.epochs = 0
        self.changes = 0
        self.registry = CollectorRegistry()
        timeouts = ControlTimeouts(connect_s=1.0, stream_idle_s=STREAM_IDLE_S)
        self._client = ControlClient(control.url, token=token, timeouts=timeouts)
        self.watcher = TableWatcher(
            self._client,
            self.consumer,
            metrics=ControlLinkMetrics(self.registry),
            on_table_changed=self._changed,
            on_new_epoch=self._new_epoch,
        )

    def _changed(self) -> None:
        self.changes += 1

    def _new_epoch(self) -> None:
        self.epochs += 1

    @property
    def connected(self) -> bool:
        return self.registry.get_sample_value("faasmoe_router_control_connected") == 1

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self._task.done(), "the watcher ended"
            await asyncio.sleep(0.005)

    async def __aenter__(self) -> "WatcherHarness":
        self._task = asyncio.create_task(self.watcher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()


@pytest.fixture
def names(cold_table: RoutingTable) -> list[str]:
    return [entry.spec.id for entry in cold_table.functions]


def test_a_snapshot_and_its_updates_are_applied(
    control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            assert harness.consumer.addresses == dict.fromkeys(names, ())
            control.set_addresses({names[0]: ["127.0.0.1:1"]})
            await harness.until(lambda: harness.consumer.versions == [1, 2])
            assert harness.consumer.addresses[names[0]] == ("127.0.0.1:1",)
            assert harness.changes == 2
            assert harness.epochs == 1
            assert harness.registry.get_sample_value("faasmoe_router_routing_table_version") == 2

    on_loop(scenario)


def test_an_aborted_stream_is_resumed_from_the_last_version(
    control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            control.set_addresses({names[0]: ["127.0.0.1:1"]})
            await harness.until(lambda: harness.consumer.versions == [1, 2])
            later = {"kind": "change", "version": 3, "functions": []}
            control.first_lines = lambda: [json.dumps(later).encode() + b"\n"]
            control.send_line(ABORT)
            await harness.until(lambda: harness.consumer.versions == [1, 2, 3])
            assert control.table_queries == [{}, {"epoch": "first", "version": "2"}]
            assert harness.epochs == 1

    on_loop(scenario)


def test_a_stream_that_ends_is_reopened(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            control.send_line(END_OF_STREAM)
            await harness.until(lambda: len(control.table_queries) == 2)

    on_loop(scenario)


def test_a_restarted_control_process_starts_a_new_epoch(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            control.stop()
            await harness.until(lambda: not harness.connected)
            assert harness.consumer.addresses
            control.epoch = "second"
            control.start()
            await harness.until(lambda: harness.epochs == 2)
            assert harness.connected

    on_loop(scenario)


VALID_UPDATE: dict[str, Any] = {"kind": "change", "version": 2, "functions": []}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"not json\n", id="no json"),
        pytest.param(b"[]\n", id="no object"),
        pytest.param(b"\x00\xff\xfe\n", id="bytes"),
        pytest.param(VALID_UPDATE | {"version": 1}, id="same version"),
        pytest.param(VALID_UPDATE | {"version": 0}, id="older version"),
        pytest.param(
            VALID_UPDATE | {"functions": [{"id": "nobody", "addresses": []}]}, id="unknown function"
        ),
        pytest.param(
            {
                "kind": "snapshot",
                "epoch": "first",
                "version": 9,
                "table": {"model_digest": "sha256:other", "version": 9, "functions": []},
            },
            id="another model",
        ),
    ],
)
def test_an_invalid_message_keeps_the_table_and_the_next_stream_starts_over(
    line: bytes | dict[str, Any], control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    sent = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"

    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            control.send_line(sent)
            await harness.until(lambda: len(control.table_queries) == 2)
            assert control.table_queries[1] == {}
            await harness.until(lambda: harness.consumer.versions == [1, 1])
            assert harness.consumer.addresses == dict.fromkeys(names, ())

    on_loop(scenario)


def test_a_stream_must_not_start_with_an_update(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.first_lines = lambda: [json.dumps(VALID_UPDATE).encode() + b"\n"]
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: len(control.table_queries) == 2)
            assert not harness.watcher.has_table

    on_loop(scenario)


@pytest.mark.parametrize(
    "first_lines",
    [
        pytest.param([], id="silent"),
        pytest.param([b'{"kind": "snap'], id="half a line"),
        pytest.param([b'{"kind": "snap', ABORT], id="half a line and an abort"),
        pytest.param([ABORT], id="abort"),
        pytest.param([END_OF_STREAM], id="empty response"),
    ],
)
def test_a_stream_without_messages_is_abandoned(
    first_lines: list[bytes], control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.first_lines = lambda: first_lines
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: len(control.table_queries) >= 2)
            assert not harness.connected
            control.first_lines = lambda: [control.snapshot()]
            await harness.until(lambda: harness.connected)

    on_loop(scenario)


def test_an_idle_stream_is_abandoned_and_pings_keep_it_open(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as harness:
            await harness.until(lambda: harness.connected)
            for _ in range(24):  # longer than the idle timeout
                await asyncio.sleep(STREAM_IDLE_S / 20)
                control.send_line(b'{"kind": "ping"}\n')
            assert len(control.table_queries) == 1
            await harness.until(lambda: len(control.table_queries) == 2)

    on_loop(scenario)


def test_a_rejected_stream_is_retried(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control, token="wrong") as harness:
            await harness.until(lambda: len(control.table_queries) == 2)
            assert not harness.watcher.has_table

    on_loop(scenario)
