import asyncio

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.routing_table import MAX_HISTORY, RoutingTablePublisher

SPECS = [FunctionSpec(f"f{index}", (index,), (0, 1)) for index in range(3)]


def publisher() -> RoutingTablePublisher:
    return RoutingTablePublisher(SPECS, model_digest="sha256:0")


def test_begins_with_every_function_and_no_address() -> None:
    table = publisher().table
    assert [entry.spec for entry in table.functions] == SPECS
    assert all(entry.addresses == () for entry in table.functions)
    assert (table.model_digest, table.version) == ("sha256:0", 1)


def test_each_control_has_an_epoch_of_its_own() -> None:
    assert publisher().epoch != publisher().epoch


def test_tells_what_changed_since_a_version() -> None:
    changing = publisher()
    changing.publish({"f0": ("a:1",)})
    changing.publish({"f0": ("a:1",), "f1": ("b:1",)})
    changing.publish({"f1": ("b:1", "c:1")})
    assert changing.version == 4
    assert changing.changes_since(1) == {"f0": (), "f1": ("b:1", "c:1")}
    assert changing.changes_since(3) == {"f0": (), "f1": ("b:1", "c:1")}
    assert changing.changes_since(4) == {}


def test_the_same_addresses_are_no_change() -> None:
    changing = publisher()
    changing.publish({"f0": ("a:1",)})
    changing.publish({"f0": ("a:1",)})
    assert changing.version == 2


def test_does_not_know_versions_of_the_future_or_beyond_its_history() -> None:
    changing = publisher()
    assert changing.changes_since(2) is None
    for number in range(MAX_HISTORY + 1):
        changing.publish({"f0": (f"a:{number + 1}",)})
    assert changing.changes_since(1) is None
    assert changing.changes_since(2) == {"f0": (f"a:{MAX_HISTORY + 1}",)}
    assert changing.changes_since(0) is None


def test_wakes_those_who_wait_for_a_change() -> None:
    async def story() -> None:
        changing = publisher()
        waiting = asyncio.create_task(changing.wait_for_newer(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        changing.publish({"f2": ("a:1",)})
        await asyncio.wait_for(waiting, timeout=5)

    asyncio.run(story())
