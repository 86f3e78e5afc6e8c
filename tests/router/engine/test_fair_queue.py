"""Fair queue scenarios: a simulated batch that generates one token per running sequence a step."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from faasmoe_router.engine.fair_queue import MAX_PREEMPTIONS, FairQueue, Share, TokenPrice
from faasmoe_router.errors import TenantQueueFull


class FakeBatch:
    """A batch that only counts tokens; preempts like the engine by default."""

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


def make_batch(*, slots: int = 4, preempts: bool = True, **shares: Share) -> FakeBatch:
    queue = FairQueue(slots=slots, max_queued=10_000)
    queue.set_shares(shares)
    return FakeBatch(queue, preempts=preempts)


def test_serves_one_tenant_in_arrival_order() -> None:
    batch = make_batch(slots=1)
    sent = [batch.send("a", n_output=3) for _ in range(5)]
    batch.run(15)
    assert batch.ended == sent


def test_lone_tenant_gets_every_slot() -> None:
    batch = make_batch(a=Share(), b=Share(), c=Share())
    for _ in range(8):
        batch.send("a")
    batch.step()
    assert batch.queue.sequence_counts("a") == (4, 4)


def test_quiet_tenant_is_next_while_another_floods() -> None:
    batch = make_batch(preempts=False)
    for _ in range(100):
        batch.send("a")
    batch.run(5)
    sequence_id = batch.send("b")
    batch.run(6)  # until the first four end
    assert batch.queue.is_running(sequence_id)
    assert batch.queue.sequence_counts("a")[1] > 90


def test_preempts_shortest_sequence_of_tenant_beyond_its_share() -> None:
    batch = make_batch()
    first = [batch.send("a", n_output=1000) for _ in range(100)][:4]
    batch.run(5)
    longest, shortest = first[0], first[3]
    batch.queue.charge(longest, 50)
    batch.queue.charge(shortest, -1)
    sequence_id = batch.send("b")
    batch.schedule()
    assert batch.queue.is_running(sequence_id)
    assert not batch.queue.is_running(shortest)
    assert batch.queue.sequence_counts("a") == (3, 97)


def test_preempted_sequence_resumes_before_others_of_its_tenant() -> None:
    batch = make_batch(slots=2)
    first, second, third = (batch.send("a", n_output=50) for _ in range(3))
    batch.run(3)
    batch.send("b", n_output=2)
    batch.run(2)
    preempted = first if not batch.queue.is_running(first) else second
    batch.run(1)  # b has ended
    assert batch.queue.is_running(preempted)
    assert not batch.queue.is_running(third)
    batch.run(200)
    assert sorted(batch.ended) == sorted({*batch.ended})  # each once
    assert batch.tokens == {"a": 150, "b": 2}


def test_preemptions_per_sequence_are_limited() -> None:
    batch = make_batch(slots=2)
    batch.send("a", n_output=10_000)
    batch.send("a", n_output=10_000)
    batch.step()
    n_preemptions = 0
    for _ in range(20):
        sequence_id = batch.send("b", n_prompt=1, n_output=1)
        batch.schedule()
        n_preemptions += batch.queue.is_running(sequence_id)
        batch.run(3)
        if batch.queue.is_running(sequence_id) is False and sequence_id in batch.remaining:
            batch.queue.remove(sequence_id)
            del batch.remaining[sequence_id]
    assert n_preemptions == 2 * MAX_PREEMPTIONS


def test_does_not_preempt_tenants_within_their_shares() -> None:
    batch = make_batch(slots=4)
    for name in ("a", "b"):
        for _ in range(4):
            batch.send(name, n_output=1000)
    batch.run(3)
    assert batch.queue.sequence_counts("a") == batch.queue.sequence_counts("b") == (2, 2)
    late = batch.send("a")
    batch.schedule()
    assert not batch.queue.is_running(late)


def test_service_is_equal_for_long_and_short_requests() -> None:
    batch = make_batch(preempts=False)

    def keep_busy(_: int) -> None:
        while batch.queue.sequence_counts("a")[1] < 4:
            batch.send("a", n_prompt=200, n_output=100)
        while batch.queue.sequence_counts("b")[1] < 4:
            batch.send("b", n_prompt=5, n_output=5)

    batch.run(3000, before=keep_busy)
    counters = batch.queue.virtual_counter("a"), batch.queue.virtual_counter("b")
    assert counters[0] == pytest.approx(counters[1], rel=0.1)


def test_service_is_proportional_to_weights() -> None:
    batch = make_batch(slots=8, a=Share(weight=3), b=Share(weight=1))

    def keep_busy(_: int) -> None:
        for name in ("a", "b"):
            while batch.queue.sequence_counts(name)[1] < 8:
                batch.send(name)

    batch.run(2000, before=keep_busy)
    assert batch.tokens["a"] / batch.tokens["b"] == pytest.approx(3, rel=0.05)


def test_late_tenant_gets_equal_share_without_catching_up() -> None:
    batch = make_batch(preempts=False)

    def a_sends(_: int) -> None:
        while batch.queue.sequence_counts("a")[1] < 4:
            batch.send("a")

    batch.run(500, before=a_sends)
    before = batch.tokens["a"]

    def both_send(step: int) -> None:
        a_sends(step)
        while batch.queue.sequence_counts("b")[1] < 4:
            batch.send("b")

    batch.run(500, before=both_send)
    assert batch.tokens["b"] == pytest.approx(batch.tokens["a"] - before, rel=0.1)


def test_returning_tenant_is_lifted_to_last_drained_tenant() -> None:
    batch = make_batch()
    batch.send("a", n_output=10)
    batch.run(20)
    batch.send("b")
    batch.schedule()
    n_prompt = 10  # charged on top of the lifted counter
    assert batch.queue.virtual_counter("b") == batch.queue.virtual_counter("a") + n_prompt


def test_higher_priority_preempts_and_runs_first() -> None:
    batch = make_batch(low=Share(weight=1000), high=Share(priority=1))
    for _ in range(10):
        batch.send("low", n_output=100)
    batch.run(3)
    sequence_ids = [batch.send("high", n_output=5) for _ in range(6)]
    batch.schedule()
    assert batch.queue.sequence_counts("high") == (4, 2)
    assert batch.queue.sequence_counts("low") == (0, 10)
    batch.run(10)
    assert batch.ended == sequence_ids
    batch.step()
    assert batch.queue.sequence_counts("low") == (4, 6)


def test_max_running_limits_only_its_tenant() -> None:
    batch = make_batch(a=Share(max_running=1), b=Share())
    for _ in range(3):
        batch.send("a")
        batch.send("b")
    batch.step()
    assert batch.queue.sequence_counts("a") == (1, 2)
    assert batch.queue.sequence_counts("b") == (3, 0)


def test_tenant_at_max_running_earns_no_credit() -> None:
    batch = make_batch(preempts=False, a=Share(max_running=1), b=Share())

    def keep_busy(_: int) -> None:
        for name in ("a", "b"):
            while batch.queue.sequence_counts(name)[1] < 4:
                batch.send(name)

    batch.run(400, before=keep_busy)
    assert batch.tokens["b"] == pytest.approx(3 * batch.tokens["a"], rel=0.1)
    assert batch.queue.virtual_counter("a") == pytest.approx(
        batch.queue.virtual_counter("b"), rel=0.1
    )


def test_queue_capacity_is_divided_by_weight() -> None:
    queue = FairQueue(slots=2, max_queued=12)
    queue.set_shares({"a": Share(weight=2), "b": Share(), "c": Share(max_queued=1)})
    queue.check_capacity("a", 8)  # two start, six wait
    with pytest.raises(TenantQueueFull, match="at most 6 may be"):
        queue.check_capacity("a", 9)
    for number in range(8):
        queue.push("a", f"a/{number}", n_prompt_tokens=1)
        queue.pop()
    with pytest.raises(TenantQueueFull, match="6 of your requests are queued"):
        queue.check_capacity("a", 1)
    queue.check_capacity("b", 3)
    with pytest.raises(TenantQueueFull, match="at most 1 may be"):
        queue.check_capacity("c", 2)


def test_sequences_that_can_start_need_no_queue_capacity() -> None:
    queue = FairQueue(slots=2, max_queued=0)
    queue.check_capacity("a", 2)
    with pytest.raises(TenantQueueFull):
        queue.check_capacity("a", 3)


def test_remove_frees_slot_or_queue_position() -> None:
    batch = make_batch(slots=1)
    running, waiting = batch.send("a"), batch.send("a")
    batch.step()
    batch.queue.remove(waiting)
    assert batch.queue.sequence_counts("a") == (1, 0)
    batch.queue.remove(running)
    batch.queue.remove(running)
    assert (batch.queue.n_running, batch.queue.n_waiting) == (0, 0)
    assert batch.queue.pop() is None


def test_charges_price_over_weight() -> None:
    queue = FairQueue(slots=1, max_queued=9, price=TokenPrice(prompt=1.0, generated=2.0))
    queue.set_shares({"a": Share(weight=2), "b": Share()})
    queue.push("a", "a/1", n_prompt_tokens=10)
    assert queue.pop() == "a/1"
    queue.charge("a/1", 3)
    assert queue.virtual_counter("a") == (10 + 6) / 2
    queue.charge("unknown", 3)
    assert queue.virtual_counter("b") == 0


def test_drops_removed_tenant_once_its_sequences_end() -> None:
    batch = make_batch(a=Share(), b=Share())
    batch.send("a")
    batch.send("b", n_output=2)
    batch.step()
    batch.queue.set_shares({"b": Share()})
    assert batch.queue.sequence_counts("a") == (1, 0)
    batch.run(10)
    assert batch.queue.virtual_counter("a") == 0
    assert batch.queue.virtual_counter("b") > 0


def test_a_tenant_s_sequences_are_served_by_priority() -> None:
    queue = FairQueue(slots=1, max_queued=10)
    for name, priority in (("running", 0), ("a", 0), ("late", 5), ("b", 0), ("urgent", -1)):
        queue.push("acme", name, n_prompt_tokens=1, priority=priority)
        queue.pop()
    order: list[str] = []
    running: str | None = "running"
    while running is not None:
        order.append(running)
        queue.remove(running)
        running = queue.pop()
    assert order == ["running", "urgent", "a", "b", "late"]


def test_a_preemption_takes_time_in_proportion_to_the_active_tenants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_slots, n_tenants = 32, 400
    queue = FairQueue(slots=n_slots, max_queued=10 * n_tenants)
    queue.set_shares({f"t{n}": Share() for n in range(n_tenants)})
    for n in range(n_tenants):
        for number in range(2):
            queue.push(f"t{n}", f"{n}/{number}", n_prompt_tokens=10)
    while queue.pop() is not None:
        pass
    lookups: list[str] = []
    share_of = FairQueue._share

    def counted(self: FairQueue, tenant: str) -> Share:
        lookups.append(tenant)
        return share_of(self, tenant)

    monkeypatch.setattr(FairQueue, "_share", counted)
    queue.preempt()
    assert n_tenants <= len(lookups) < n_slots * n_tenants / 2
