"""The fair queue as stories: a batch of a few slots, a token a step for each that runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from faasmoe_router.engine.fair_queue import MAX_PREEMPTIONS, FairQueue, Share, TokenPrice
from faasmoe_router.errors import TenantQueueFull


class FakeBatch:
    """An engine of nothing but counting; with parking it takes slots back, as the real one does."""

    def __init__(self, queue: FairQueue, *, preempts: bool = True) -> None:
        self.queue = queue
        self.remaining: dict[str, int] = {}
        self.tokens: Counter[str] = Counter()  # generated, by tenant
        self.ended: list[str] = []
        self.started: list[str] = []
        self._preempts = preempts
        self._numbers = itertools.count()

    def send(self, tenant: str, *, n_prompt: int = 10, n_output: int = 10) -> str:
        name = f"{tenant}/{next(self._numbers)}"
        self.remaining[name] = n_output
        self.queue.push(tenant, name, n_prompt_tokens=n_prompt)
        return name

    def schedule(self) -> None:
        while True:
            while (name := self.queue.pop()) is not None:
                self.started.append(name)
            if not self._preempts or self.queue.preempt() is None:
                return

    def step(self) -> None:
        self.schedule()
        for name in [name for name in self.remaining if self.queue.is_running(name)]:
            self.remaining[name] -= 1
            self.tokens[name.partition("/")[0]] += 1
            self.queue.charge(name, 1)
            if not self.remaining[name]:
                del self.remaining[name]
                self.ended.append(name)
                self.queue.remove(name)

    def run(self, n_steps: int, *, before: Callable[[int], None] = lambda _: None) -> None:
        for number in range(n_steps):
            before(number)
            self.step()


def batch(*, slots: int = 4, preempts: bool = True, **shares: Share) -> FakeBatch:
    queue = FairQueue(slots=slots, max_queued=10_000)
    queue.set_shares(shares)
    return FakeBatch(queue, preempts=preempts)


def test_one_tenant_is_served_in_its_order() -> None:
    b = batch(slots=1)
    sent = [b.send("a", n_output=3) for _ in range(5)]
    b.run(15)
    assert b.ended == sent


def test_who_is_alone_has_every_slot() -> None:
    b = batch(a=Share(), b=Share(), c=Share())
    for _ in range(8):
        b.send("a")
    b.step()
    assert b.queue.sequence_counts("a") == (4, 4)


def test_a_flood_leaves_a_quiet_tenant_its_turn() -> None:
    """A hundred requests of a's wait when b's one comes: it is the next to start."""
    b = batch(preempts=False)
    for _ in range(100):
        b.send("a")
    b.run(5)
    mine = b.send("b")
    b.run(6)  # until the first four end
    assert b.queue.is_running(mine)
    assert b.queue.sequence_counts("a")[1] > 90


def test_who_finds_all_slots_taken_gets_one_at_once_from_who_is_beyond_its_share() -> None:
    b = batch()
    first = [b.send("a", n_output=1000) for _ in range(100)][:4]
    b.run(5)
    old, young = first[0], first[3]
    b.queue.charge(old, 50)  # further on than the others, which are equal: the last name gives way
    b.queue.charge(young, -1)
    mine = b.send("b")
    b.schedule()
    assert b.queue.is_running(mine)
    assert not b.queue.is_running(young)
    assert b.queue.sequence_counts("a") == (3, 97)


def test_what_gave_way_goes_on_before_its_tenant_s_others() -> None:
    b = batch(slots=2)
    first, second, third = (b.send("a", n_output=50) for _ in range(3))
    b.run(3)
    b.send("b", n_output=2)
    b.run(2)
    parked = first if not b.queue.is_running(first) else second
    b.run(1)  # b has ended
    assert b.queue.is_running(parked)
    assert not b.queue.is_running(third)
    b.run(200)
    assert sorted(b.ended) == sorted({*b.ended})  # each once
    assert b.tokens == {"a": 150, "b": 2}


def test_a_sequence_gives_way_only_so_often() -> None:
    b = batch(slots=2)
    b.send("a", n_output=10_000)
    b.send("a", n_output=10_000)
    b.step()
    n_parked = 0
    for _ in range(20):
        mine = b.send("b", n_prompt=1, n_output=1)
        b.schedule()
        n_parked += b.queue.is_running(mine)
        b.run(3)
        if b.queue.is_running(mine) is False and mine in b.remaining:
            b.queue.remove(mine)
            del b.remaining[mine]
    assert n_parked == 2 * MAX_PREEMPTIONS


def test_within_their_shares_nobody_gives_way() -> None:
    b = batch(slots=4)
    for name in ("a", "b"):
        for _ in range(4):
            b.send(name, n_output=1000)
    b.run(3)
    assert b.queue.sequence_counts("a") == b.queue.sequence_counts("b") == (2, 2)
    late = b.send("a")
    b.schedule()
    assert not b.queue.is_running(late)


def test_tokens_are_shared_however_requests_are_cut() -> None:
    """a sends few long ones and b many short ones: both get as many tokens' worth."""
    b = batch(preempts=False)

    def keep_busy(_: int) -> None:
        while b.queue.sequence_counts("a")[1] < 4:
            b.send("a", n_prompt=200, n_output=100)
        while b.queue.sequence_counts("b")[1] < 4:
            b.send("b", n_prompt=5, n_output=5)

    b.run(3000, before=keep_busy)
    counters = b.queue.virtual_counter("a"), b.queue.virtual_counter("b")
    assert counters[0] == pytest.approx(counters[1], rel=0.1)


def test_weights_are_respected() -> None:
    b = batch(slots=8, a=Share(weight=3), b=Share(weight=1))

    def keep_busy(_: int) -> None:
        for name in ("a", "b"):
            while b.queue.sequence_counts(name)[1] < 8:
                b.send(name)

    b.run(2000, before=keep_busy)
    assert b.tokens["a"] / b.tokens["b"] == pytest.approx(3, rel=0.05)


def test_idleness_saves_nothing_up() -> None:
    """b comes after a long time of a's: it shares from then on, and does not catch up."""
    b = batch(preempts=False)

    def a_sends(_: int) -> None:
        while b.queue.sequence_counts("a")[1] < 4:
            b.send("a")

    b.run(500, before=a_sends)
    before = b.tokens["a"]

    def both_send(step: int) -> None:
        a_sends(step)
        while b.queue.sequence_counts("b")[1] < 4:
            b.send("b")

    b.run(500, before=both_send)
    assert b.tokens["b"] == pytest.approx(b.tokens["a"] - before, rel=0.1)


def test_who_comes_back_when_nobody_waits_is_level_with_who_came_last() -> None:
    b = batch()
    b.send("a", n_output=10)
    b.run(20)
    b.send("b")
    b.schedule()
    assert b.queue.virtual_counter("b") == b.queue.virtual_counter("a") + 10  # and its own prompt


def test_a_higher_priority_goes_first_and_takes_slots() -> None:
    b = batch(low=Share(weight=1000), high=Share(priority=1))
    for _ in range(10):
        b.send("low", n_output=100)
    b.run(3)
    mine = [b.send("high", n_output=5) for _ in range(6)]
    b.schedule()
    assert b.queue.sequence_counts("high") == (4, 2)
    assert b.queue.sequence_counts("low") == (0, 10)
    b.run(10)
    assert b.ended == mine
    b.step()
    assert b.queue.sequence_counts("low") == (4, 6)


def test_a_tenant_s_own_limit_holds_it_back_and_nobody_else() -> None:
    b = batch(a=Share(max_running=1), b=Share())
    for _ in range(3):
        b.send("a")
        b.send("b")
    b.step()
    assert b.queue.sequence_counts("a") == (1, 2)
    assert b.queue.sequence_counts("b") == (3, 0)


def test_who_is_held_back_by_its_own_limit_saves_nothing_up() -> None:
    b = batch(preempts=False, a=Share(max_running=1), b=Share())

    def keep_busy(_: int) -> None:
        for name in ("a", "b"):
            while b.queue.sequence_counts(name)[1] < 4:
                b.send(name)

    b.run(400, before=keep_busy)
    assert b.tokens["b"] == pytest.approx(3 * b.tokens["a"], rel=0.1)
    assert b.queue.virtual_counter("a") == pytest.approx(b.queue.virtual_counter("b"), rel=0.1)


def test_each_tenant_has_its_own_part_of_the_queue() -> None:
    queue = FairQueue(slots=2, max_queued=12)
    queue.set_shares({"a": Share(weight=2), "b": Share(), "c": Share(max_queued=1)})
    queue.check_capacity("a", 8)  # two start, six wait
    with pytest.raises(TenantQueueFull, match="at most 6 may"):
        queue.check_capacity("a", 9)
    for number in range(8):
        queue.push("a", f"a/{number}", n_prompt_tokens=1)
        queue.pop()
    with pytest.raises(TenantQueueFull, match="6 of your requests wait"):
        queue.check_capacity("a", 1)
    queue.check_capacity("b", 3)
    with pytest.raises(TenantQueueFull, match="at most 1 may"):
        queue.check_capacity("c", 2)


def test_what_can_start_at_once_needs_no_room() -> None:
    queue = FairQueue(slots=2, max_queued=0)
    queue.check_capacity("a", 2)
    with pytest.raises(TenantQueueFull):
        queue.check_capacity("a", 3)


def test_what_is_given_up_leaves_its_place_or_its_slot() -> None:
    b = batch(slots=1)
    running, waiting = b.send("a"), b.send("a")
    b.step()
    b.queue.remove(waiting)
    assert b.queue.sequence_counts("a") == (1, 0)
    b.queue.remove(running)
    b.queue.remove(running)
    assert (b.queue.n_running, b.queue.n_waiting) == (0, 0)
    assert b.queue.pop() is None


def test_prices_are_charged_over_weights_and_a_prompt_once() -> None:
    queue = FairQueue(slots=1, max_queued=9, price=TokenPrice(prompt=1.0, generated=2.0))
    queue.set_shares({"a": Share(weight=2), "b": Share()})
    queue.push("a", "a/1", n_prompt_tokens=10)
    assert queue.pop() == "a/1"
    queue.charge("a/1", 3)
    assert queue.virtual_counter("a") == (10 + 6) / 2
    queue.charge("unknown", 3)
    assert queue.virtual_counter("b") == 0


def test_who_is_not_a_tenant_any_more_is_forgotten_when_it_has_ended() -> None:
    b = batch(a=Share(), b=Share())
    b.send("a")
    b.send("b", n_output=2)
    b.step()
    b.queue.set_shares({"b": Share()})
    assert b.queue.sequence_counts("a") == (1, 0)
    b.run(10)
    assert b.queue.virtual_counter("a") == 0
    assert b.queue.virtual_counter("b") > 0
