"""Choice of a router: affinity within a bound of load, least outstanding tokens otherwise."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway.router_choice import LOAD_FACTOR, HashRing, affinity_key, choose_router

NAMES = ["r0", "r1", "r2", "r3"]
LOADS = st.fixed_dictionaries({name: st.integers(0, 10_000) for name in NAMES})


def test_without_a_key_the_least_loaded_is_chosen() -> None:
    loads = {"r0": 5, "r1": 3, "r2": 9, "r3": 4}
    assert choose_router(HashRing(NAMES), loads, b"") == "r1"
    assert choose_router(HashRing(NAMES), {}, b"") == "r0"


def test_same_key_goes_to_the_same_router_while_loads_allow() -> None:
    ring = HashRing(NAMES)
    first = choose_router(ring, {}, b"key")
    assert choose_router(ring, dict.fromkeys(NAMES, 100), b"key") == first
    crowded = {name: 1000 if name == first else 10 for name in NAMES}
    assert choose_router(ring, crowded, b"key") == ring.walk(b"key")[1]


def test_keys_spread_over_all_routers() -> None:
    ring = HashRing(NAMES)
    chosen = Counter(choose_router(ring, {}, f"key-{index}".encode()) for index in range(4000))
    assert set(chosen) == set(NAMES)
    assert max(chosen.values()) < 2 * 1000


def test_a_router_that_goes_moves_only_its_own_keys() -> None:
    ring, smaller = HashRing(NAMES), HashRing(NAMES[1:])
    for key in (f"key-{index}".encode() for index in range(500)):
        before = choose_router(ring, {}, key)
        if before != "r0":
            assert choose_router(smaller, {}, key) == before


@given(loads=LOADS, key=st.binary(max_size=20))
def test_load_is_bounded(loads: dict[str, int], key: bytes) -> None:
    chosen = choose_router(HashRing(NAMES), loads, key)
    bound = max(LOAD_FACTOR * sum(loads.values()) / len(loads), min(loads.values()))
    assert loads[chosen] <= bound


def test_sessions_and_prefixes_of_tenants_are_apart() -> None:
    keys = {
        affinity_key("a", session="s", prefix=b"x"),
        affinity_key("b", session="s", prefix=b"x"),
        affinity_key("a", session="", prefix=b"s"),
        affinity_key("b", session="", prefix=b"s"),
    }
    assert len(keys) == 4
    assert affinity_key("a", session="", prefix=b"") == b""
    assert affinity_key("a", session="s", prefix=b"x") == affinity_key("a", session="s", prefix=b"")
