"""The table stream from a real server that cuts, stalls, lies and comes back."""

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


class FakeDispatcher:
    """Takes tables, and refuses other models' and unknown functions, as the dispatcher does."""

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
    """A follower that runs in a block, and what came of it."""

    def __init__(self, control: FakeControl, *, token: str = TOKEN) -> None:
        self.consumer = FakeDispatcher(control.table.model_digest)
        self.epochs = 0
        self.changes = 0
        self.registry = CollectorRegistry()
        timeouts = ControlTimeouts(connect_s=1.0, stream_idle_s=0.3)
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
            assert not self._task.done(), "the follower ended"
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


def test_a_snapshot_and_its_changes_are_taken(
    control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            assert f.consumer.addresses == dict.fromkeys(names, ())
            control.set_addresses({names[0]: ["127.0.0.1:1"]})
            await f.until(lambda: f.consumer.versions == [1, 2])
            assert f.consumer.addresses[names[0]] == ("127.0.0.1:1",)
            assert f.changes == 2
            assert f.epochs == 1
            assert f.registry.get_sample_value("faasmoe_router_routing_table_version") == 2

    on_loop(scenario)


def test_a_cut_stream_is_resumed_where_it_was(
    control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            control.set_addresses({names[0]: ["127.0.0.1:1"]})
            await f.until(lambda: f.consumer.versions == [1, 2])
            later = {"kind": "change", "version": 3, "functions": []}
            control.first_lines = lambda: [json.dumps(later).encode() + b"\n"]
            control.send_line(ABORT)
            await f.until(lambda: f.consumer.versions == [1, 2, 3])
            assert control.table_queries == [{}, {"epoch": "first", "version": "2"}]
            assert f.epochs == 1

    on_loop(scenario)


def test_a_stream_that_ends_is_begun_again(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            control.send_line(END_OF_STREAM)
            await f.until(lambda: len(control.table_queries) == 2)

    on_loop(scenario)


def test_another_control_process_is_noticed(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            control.stop()
            await f.until(lambda: not f.connected)
            assert f.consumer.addresses
            control.epoch = "second"
            control.start()
            await f.until(lambda: f.epochs == 2)
            assert f.connected

    on_loop(scenario)


GOOD_CHANGE: dict[str, Any] = {"kind": "change", "version": 2, "functions": []}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"not json\n", id="no json"),
        pytest.param(b"[]\n", id="no object"),
        pytest.param(b"\x00\xff\xfe\n", id="bytes"),
        pytest.param(GOOD_CHANGE | {"version": 1}, id="a version again"),
        pytest.param(GOOD_CHANGE | {"version": 0}, id="an older version"),
        pytest.param(
            GOOD_CHANGE | {"functions": [{"id": "nobody", "addresses": []}]}, id="unknown function"
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
def test_after_garbage_the_table_stays_and_the_next_stream_begins_anew(
    line: bytes | dict[str, Any], control: FakeControl, names: list[str], on_loop: OnLoop
) -> None:
    sent = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"

    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            control.send_line(sent)
            await f.until(lambda: len(control.table_queries) == 2)
            assert control.table_queries[1] == {}
            await f.until(lambda: f.consumer.versions == [1, 1])
            assert f.consumer.addresses == dict.fromkeys(names, ())

    on_loop(scenario)


def test_a_stream_must_not_begin_with_a_change(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        control.first_lines = lambda: [json.dumps(GOOD_CHANGE).encode() + b"\n"]
        async with WatcherHarness(control) as f:
            await f.until(lambda: len(control.table_queries) == 2)
            assert not f.watcher.has_table

    on_loop(scenario)


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param([], id="says nothing"),
        pytest.param([b'{"kind": "snap'], id="half a line"),
        pytest.param([b'{"kind": "snap', ABORT], id="half a line and a cut"),
        pytest.param([ABORT], id="cut"),
        pytest.param([END_OF_STREAM], id="an empty answer"),
    ],
)
def test_a_stream_that_tells_nothing_is_left(
    opening: list[bytes], control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.first_lines = lambda: opening
        async with WatcherHarness(control) as f:
            await f.until(lambda: len(control.table_queries) >= 2)
            assert not f.connected
            control.first_lines = lambda: [control.snapshot()]
            await f.until(lambda: f.connected)

    on_loop(scenario)


def test_a_stream_that_falls_silent_is_left_and_pings_keep_one(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control) as f:
            await f.until(lambda: f.connected)
            for _ in range(8):  # 0.4 s, with a silence of 0.3 s allowed
                await asyncio.sleep(0.05)
                control.send_line(b'{"kind": "ping"}\n')
            assert len(control.table_queries) == 1
            await f.until(lambda: len(control.table_queries) == 2)

    on_loop(scenario)


def test_a_wrong_token_is_tried_again_later(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with WatcherHarness(control, token="wrong") as f:
            await f.until(lambda: len(control.table_queries) == 2)
            assert not f.watcher.has_table

    on_loop(scenario)
