"""Which connections are closed when there are too many."""

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway.connections import ConnectionLimits, ConnectionTable, descriptor_limited


def table(*, total: int = 3, per_address: int = 9) -> ConnectionTable:
    return ConnectionTable(ConnectionLimits(max_connections=total, max_per_address=per_address))


def test_the_oldest_unknown_connection_goes_first() -> None:
    connections = table()
    for name in ("known", "old", "new"):
        assert connections.admit(name, "a") == (True, None)
    connections.set_known("known")
    connections.set_busy("known", is_busy=False)
    assert connections.admit("next", "b") == (True, "old")
    assert connections.admit("after", "b") == (True, "new")
    connections.set_busy("next", is_busy=True)
    connections.set_busy("after", is_busy=True)
    assert connections.admit("last", "b") == (True, "known")


def test_a_connection_that_is_answered_is_never_closed_for_another() -> None:
    connections = table(total=1)
    connections.admit("busy", "a")
    connections.set_known("busy")
    connections.set_busy("busy", is_busy=True)
    assert connections.admit("new", "b") == (False, None)
    connections.set_busy("busy", is_busy=False)
    assert connections.admit("new", "b") == (True, "busy")


def test_an_address_closes_only_its_own() -> None:
    connections = table(total=9, per_address=2)
    for name, address in (("b1", "b"), ("a1", "a"), ("a2", "a")):
        connections.admit(name, address)
    assert connections.admit("a3", "a") == (True, "a1")
    for name in ("a2", "a3"):
        connections.set_busy(name, is_busy=True)
    assert connections.admit("a4", "a") == (False, None)
    assert connections.admit("b2", "b") == (True, None)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ab"), st.integers(0, 4))))
def test_the_caps_hold_whatever_happens(steps: list[tuple[int, str, int]]) -> None:
    connections, open_ones = table(total=3, per_address=2), dict[object, str]()
    for number, (name, address, action) in enumerate(steps):
        if action == 0:
            has_place, victim = connections.admit((name, number), address)
            open_ones.pop(victim, None)
            if has_place:
                open_ones[(name, number)] = address
        else:
            for connection in [key for key in open_ones if key[0] == name]:  # type: ignore[index]
                if action == 1:
                    connections.remove(connection)
                    del open_ones[connection]
                elif action == 2:
                    connections.set_known(connection)
                else:
                    connections.set_busy(connection, is_busy=action == 3)
        assert len(connections) == len(open_ones) <= 3
        assert all(list(open_ones.values()).count(address) <= 2 for address in "ab")


def test_descriptors_bound_the_connections() -> None:
    assert descriptor_limited(10) == 10
    assert 1 <= descriptor_limited(1 << 30) < 1 << 30
