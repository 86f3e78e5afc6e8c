import asyncio

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.routing_table import MAX_HISTORY, RoutingTablePublisher

SPECS = [FunctionSpec(f"f{index}", (index,), (0, 1)) for index in range(3)]


def make_publisher() -> RoutingTablePublisher:
    return RoutingTablePublisher(SPECS, model_digest="sha256:0")


def test_starts_with_every_function_and_no_address() -> None:
    table = make_publisher().table
    assert [entry.spec for entry in table.functions] == SPECS
    assert all(entry.addresses == () for entry in table.functions)
    assert (table.model_digest, table.version) == ("sha256:0", 1)


def test_each_publisher_has_its_own_epoch() -> None:
    assert make_publisher().epoch != make_publisher().epoch


def test_returns_the_changes_since_a_version() -> None:
    publisher = make_publisher()
    publisher.publish({"f0": ("a:1",)})
    publisher.publish({"f0": ("a:1",), "f1": ("b:1",)})
    publisher.publish({"f1": ("b:1", "c:1")})
    assert publisher.version == 4
    assert publisher.changes_since(1) == {"f0": (), "f1": ("b:1", "c:1")}
    assert publisher.changes_since(3) == {"f0": (), "f1": ("b:1", "c:1")}
    assert publisher.changes_since(4) == {}


def test_the_same_addresses_are_no_change() -> None:
    publisher = make_publisher()
    publisher.publish({"f0": ("a:1",)})
    publisher.publish({"f0": ("a:1",)})
    assert publisher.version == 2


def test_has_no_changes_for_future_versions_or_beyond_its_history() -> None:
    publisher = make_publisher()
    assert publisher.changes_since(2) is None
    for number in range(MAX_HISTORY + 1):
        publisher.publish({"f0": (f"a:{number + 1}",)})
    assert publisher.changes_since(1) is None
    assert publisher.changes_since(2) == {"f0": (f"a:{MAX_HISTORY + 1}",)}
    assert publisher.changes_since(0) is None


def test_wakes_watchers_on_a_change() -> None:
    async def scenario() -> None:
        publisher = make_publisher()
        waiting = asyncio.create_task(publisher.wait_for_newer(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        publisher.publish({"f2": ("a:1",)})
        await asyncio.wait_for(waiting, timeout=120)

    asyncio.run(scenario())
