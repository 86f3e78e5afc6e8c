"""The clock and the nodes' memory."""

from __future__ import annotations

from benchmarks.simulation.events import EventLoop, Integral
from benchmarks.simulation.nodes import Nodes, Pod


def test_events_run_in_order_of_time_and_then_of_scheduling() -> None:
    loop, order = EventLoop(), list[str]()
    loop.at(2, lambda: order.append("late"))
    loop.at(1, lambda: order.append("first"))
    loop.at(1, lambda: order.append("second"))
    loop.at(1.5, lambda: order.append("cancelled")).cancel()
    loop.run_until(1.9)
    assert (order, loop.now) == (["first", "second"], 1.9)
    loop.run_until(5)
    assert order[-1] == "late"


def test_an_event_may_schedule_one_in_the_past_which_is_now() -> None:
    loop, times = EventLoop(), list[float]()

    def look_back() -> None:
        loop.at(1, lambda: times.append(loop.now))

    loop.at(3, look_back)
    loop.run_until(4)
    assert times == [3]


def test_an_integral_sums_steps() -> None:
    loop = EventLoop()
    value = Integral(loop, 2)
    loop.run_until(3)
    value.add(5)
    loop.run_until(4)
    assert (value.total, value.maximum) == (13, 7)


def _pod(size: int) -> Pod:
    return Pod(size, on_lost=lambda: None)


def test_the_fullest_node_that_has_room_is_taken() -> None:
    nodes = Nodes(EventLoop(), 3, 10)
    assert all(nodes.place(_pod(size)) for size in (6, 7, 3))
    assert nodes.in_use.value == 2
    assert nodes.max_used_bytes == 10


def test_spreading_takes_unused_nodes_first() -> None:
    nodes = Nodes(EventLoop(), 3, 10, is_spreading=True)
    assert all(nodes.place(_pod(2)) for _ in range(3))
    assert nodes.in_use.value == 3


def test_a_pod_over_several_nodes_is_placed_whole_or_not_at_all() -> None:
    nodes = Nodes(EventLoop(), 3, 10)
    assert nodes.place(_pod(8))
    assert not nodes.place(_pod(8), n_nodes=3)
    assert nodes.reserved_bytes.value == 8
    assert nodes.place(_pod(8), n_nodes=2)
    assert not nodes.place(_pod(11))


def test_a_lost_node_takes_its_pods_and_is_never_used_again() -> None:
    lost: list[str] = []
    nodes = Nodes(EventLoop(), 2, 10)
    nodes.place(Pod(9, on_lost=lambda: lost.append("large")))
    other = Pod(5, on_lost=lambda: lost.append("small"))
    nodes.place(other)
    assert nodes.lose_fullest()
    assert lost == ["large"]
    assert nodes.reserved_bytes.value == 5
    assert not nodes.place(_pod(6))
    nodes.remove(other)
    assert not nodes.lose_fullest()
    assert nodes.place(_pod(10))
