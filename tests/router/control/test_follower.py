"""The table stream from a real server that cuts, stalls, lies and comes back."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from control_stand_in import CUT, END, ControlStandIn
from prometheus_client import CollectorRegistry

from faasmoe_expert.table import FunctionTable, TableError
from faasmoe_router.control.client import ControlClient, ControlTimeouts
from faasmoe_router.control.follower import TableFollower
from faasmoe_router.control.metrics import ControlMetrics

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


class User:
    """Takes tables, and refuses other models' and unknown functions, as the dispatcher does."""

    def __init__(self, digest: str) -> None:
        self._digest = digest
        self.places: dict[str, tuple[str, ...]] = {}
        self.versions: list[int] = []

    def replace_table(self, table: FunctionTable) -> None:
        if table.model_digest != self._digest:
            raise TableError("model_digest: another model")
        self.places = {entry.spec.id: entry.addresses for entry in table.functions}
        self.versions.append(table.version)

    def move_functions(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        if not addresses.keys() <= self.places.keys():
            raise TableError("functions: unknown")
        self.places |= addresses
        self.versions.append(version)


class Followed:
    """A follower that runs in a block, and what came of it."""

    def __init__(self, control: ControlStandIn, *, token: str = TOKEN) -> None:
        self.user = User(control.table.model_digest)
        self.epochs = 0
        self.changes = 0
        self.registry = CollectorRegistry()
        timeouts = ControlTimeouts(connect_s=1.0, silence_s=0.3)
        self._client = ControlClient(control.url, token=token, timeouts=timeouts)
        self.follower = TableFollower(
            self._client,
            self.user,
            metrics=ControlMetrics(self.registry),
            on_table=self._changed,
            on_epoch=self._begun,
        )

    def _changed(self) -> None:
        self.changes += 1

    def _begun(self) -> None:
        self.epochs += 1

    @property
    def connected(self) -> bool:
        return self.registry.get_sample_value("faasmoe_router_control_connected") == 1

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self._task.done(), "the follower ended"
            await asyncio.sleep(0.005)

    async def __aenter__(self) -> "Followed":
        self._task = asyncio.create_task(self.follower.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()


@pytest.fixture
def names(cold_table: FunctionTable) -> list[str]:
    return [entry.spec.id for entry in cold_table.functions]


def test_a_snapshot_and_its_changes_are_taken(
    control: ControlStandIn, names: list[str], on_loop: OnLoop
) -> None:
    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            assert f.user.places == dict.fromkeys(names, ())
            control.move({names[0]: ["127.0.0.1:1"]})
            await f.until(lambda: f.user.versions == [1, 2])
            assert f.user.places[names[0]] == ("127.0.0.1:1",)
            assert f.changes == 2
            assert f.epochs == 1
            assert f.registry.get_sample_value("faasmoe_router_table_version") == 2

    on_loop(tell)


def test_a_cut_stream_is_resumed_where_it_was(
    control: ControlStandIn, names: list[str], on_loop: OnLoop
) -> None:
    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            control.move({names[0]: ["127.0.0.1:1"]})
            await f.until(lambda: f.user.versions == [1, 2])
            later = {"kind": "change", "version": 3, "functions": []}
            control.opening = lambda: [json.dumps(later).encode() + b"\n"]
            control.send(CUT)
            await f.until(lambda: f.user.versions == [1, 2, 3])
            assert control.places == [{}, {"epoch": "first", "version": "2"}]
            assert f.epochs == 1

    on_loop(tell)


def test_a_stream_that_ends_is_begun_again(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            control.send(END)
            await f.until(lambda: len(control.places) == 2)

    on_loop(tell)


def test_another_control_process_is_noticed(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            control.stop()
            await f.until(lambda: not f.connected)
            assert f.user.places
            control.epoch = "second"
            control.start()
            await f.until(lambda: f.epochs == 2)
            assert f.connected

    on_loop(tell)


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
    line: bytes | dict[str, Any], control: ControlStandIn, names: list[str], on_loop: OnLoop
) -> None:
    sent = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"

    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            control.send(sent)
            await f.until(lambda: len(control.places) == 2)
            assert control.places[1] == {}
            await f.until(lambda: f.user.versions == [1, 1])
            assert f.user.places == dict.fromkeys(names, ())

    on_loop(tell)


def test_a_stream_must_not_begin_with_a_change(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        control.opening = lambda: [json.dumps(GOOD_CHANGE).encode() + b"\n"]
        async with Followed(control) as f:
            await f.until(lambda: len(control.places) == 2)
            assert not f.follower.has_table

    on_loop(tell)


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param([], id="says nothing"),
        pytest.param([b'{"kind": "snap'], id="half a line"),
        pytest.param([b'{"kind": "snap', CUT], id="half a line and a cut"),
        pytest.param([CUT], id="cut"),
        pytest.param([END], id="an empty answer"),
    ],
)
def test_a_stream_that_tells_nothing_is_left(
    opening: list[bytes], control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        control.opening = lambda: opening
        async with Followed(control) as f:
            await f.until(lambda: len(control.places) >= 2)
            assert not f.connected
            control.opening = lambda: [control.snapshot()]
            await f.until(lambda: f.connected)

    on_loop(tell)


def test_a_stream_that_falls_silent_is_left_and_pings_keep_one(
    control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        async with Followed(control) as f:
            await f.until(lambda: f.connected)
            for _ in range(8):  # 0.4 s, with a silence of 0.3 s allowed
                await asyncio.sleep(0.05)
                control.send(b'{"kind": "ping"}\n')
            assert len(control.places) == 1
            await f.until(lambda: len(control.places) == 2)

    on_loop(tell)


def test_a_wrong_token_is_tried_again_later(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with Followed(control, token="wrong") as f:
            await f.until(lambda: len(control.places) == 2)
            assert not f.follower.has_table

    on_loop(tell)
