"""Invariants of the fair queue under arbitrary load, tested with hypothesis."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from faasmoe_router.engine.fair_queue import FairQueue, Share, TokenPrice

PRICE = TokenPrice()
MAX_PROMPT, MAX_OUTPUT = 40, 20
WEIGHTS = st.integers(1, 4)
SIZES = st.tuples(st.integers(1, MAX_PROMPT), st.integers(1, MAX_OUTPUT))


class Simulation:
    """Backlogged tenants whose requests cycle through given (prompt, output) sizes, in tokens."""

    def __init__(self, slots: int, weights: dict[str, int], sizes: list[tuple[int, int]]) -> None:
        self.queue = FairQueue(slots=slots, max_queued=1000)
        self.queue.set_shares({name: Share(weight=weight) for name, weight in weights.items()})
        self.weights = weights
        self.service: Counter[str] = Counter()
        self._sizes = sizes
        self._remaining: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self._n = 0

    def step(self, backlogs: dict[str, int]) -> None:
        for tenant, depth in backlogs.items():
            while self.queue.sequence_counts(tenant)[1] < depth:
                self._send(tenant)
        while True:
            while (name := self.queue.pop()) is not None:
                self.service[_tenant(name)] += int(self._prompts.pop(name, 0) * PRICE.prompt)
            if self.queue.preempt() is None:
                break
        for name in [name for name in self._remaining if self.queue.is_running(name)]:
            self._generate(name)

    def _send(self, tenant: str) -> None:
        self._n += 1
        name = f"{tenant}/{self._n}"
        n_prompt, self._remaining[name] = self._sizes[self._n % len(self._sizes)]
        self._prompts[name] = n_prompt
        self.queue.push(tenant, name, n_prompt_tokens=n_prompt)

    def _generate(self, name: str) -> None:
        self.queue.charge(name, 1)
        self.service[_tenant(name)] += int(PRICE.generated)
        self._remaining[name] -= 1
        if not self._remaining[name]:
            del self._remaining[name]
            self.queue.remove(name)


def _tenant(name: str) -> str:
    return name.partition("/")[0]


@given(
    slots=st.integers(1, 6),
    weights=st.tuples(WEIGHTS, WEIGHTS),
    sizes=st.lists(SIZES, min_size=1, max_size=5),
    depths=st.tuples(st.integers(0, 2), st.integers(0, 60)),
)
@settings(max_examples=60, deadline=None)
def test_service_difference_of_two_backlogged_tenants_is_bounded(
    slots: int, weights: tuple[int, int], sizes: list[tuple[int, int]], depths: tuple[int, int]
) -> None:
    """The paper's bound: twice the larger of a prompt's cost and a whole batch's cost."""
    run = Simulation(slots, dict(zip("ab", weights, strict=True)), sizes)
    bound = 2 * max(PRICE.prompt * MAX_PROMPT, PRICE.generated * slots * MAX_OUTPUT)
    bound += PRICE.prompt * MAX_PROMPT  # one prompt is charged before the other tenant's first
    for _ in range(150):
        run.step({"a": slots + depths[0], "b": slots + depths[1]})
        a, b = (run.service[name] / run.weights[name] for name in "ab")
        assert abs(a - b) <= bound / min(weights)


@given(
    slots=st.integers(1, 6),
    n_others=st.integers(1, 5),
    sizes=st.lists(SIZES, min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_quiet_tenant_is_served_while_others_flood(
    slots: int, n_others: int, sizes: list[tuple[int, int]]
) -> None:
    names = ["quiet", *(f"flood{i}" for i in range(n_others))]
    run = Simulation(slots, dict.fromkeys(names, 1), sizes)
    for _ in range(50):
        run.step(dict.fromkeys(names[1:], 40))
    before = run.service["quiet"]
    for _ in range(MAX_OUTPUT * len(names)):  # the longest request of each, one after another
        run.step({**dict.fromkeys(names[1:], 40), "quiet": 1})
    assert run.service["quiet"] > before


@given(
    slots=st.integers(1, 5),
    weights=st.lists(WEIGHTS, min_size=2, max_size=4),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_long_run_service_is_proportional_to_weight(
    slots: int, weights: list[int], sizes: list[tuple[int, int]]
) -> None:
    run = Simulation(slots, {f"t{i}": weight for i, weight in enumerate(weights)}, sizes)
    for _ in range(1500):
        run.step(dict.fromkeys(run.weights, 5))
    weighted_service = [run.service[name] / weight for name, weight in run.weights.items()]
    assume(min(weighted_service) > 0)
    slack = 4 * (MAX_PROMPT + PRICE.generated * slots * MAX_OUTPUT)
    assert max(weighted_service) - min(weighted_service) <= slack


class Operations(RuleBasedStateMachine):
    """Arbitrary sequences of arrivals, dispatches, tokens, removals and changes of shares."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(slots=3, max_queued=100)
        self.shares: dict[str, Share] = {}
        self.waiting: dict[str, str] = {}
        self.running: dict[str, str] = {}
        self.n = 0

    @rule(
        shares=st.dictionaries(
            st.sampled_from("abc"),
            st.builds(
                Share,
                weight=WEIGHTS,
                priority=st.integers(-1, 1),
                max_running=st.none() | st.integers(1, 3),
            ),
        )
    )
    def set_shares(self, shares: dict[str, Share]) -> None:
        self.shares = shares
        self.queue.set_shares(shares)

    @rule(tenant=st.sampled_from("abcd"), n_prompt=st.integers(1, 50))
    def push(self, tenant: str, n_prompt: int) -> None:
        self.n += 1
        self.waiting[f"{tenant}/{self.n}"] = tenant
        self.queue.push(tenant, f"{tenant}/{self.n}", n_prompt_tokens=n_prompt)

    @rule()
    def pop(self) -> None:
        name = self.queue.pop()
        if name is None:
            assert len(self.running) == 3 or not any(map(self._may_start, self.waiting.values()))
            return
        best = max(self._priority(t) for t in self.waiting.values() if self._may_start(t))
        assert self._priority(self.waiting[name]) == best
        self.running[name] = self.waiting.pop(name)

    @rule()
    def preempt(self) -> None:
        name = self.queue.preempt()
        if name is not None:
            assert len(self.running) == 3
            self.waiting[name] = self.running.pop(name)
            successor = self.queue.pop()  # of another tenant than the preempted sequence
            assert successor is not None
            assert self.waiting[successor] != self.waiting[name]
            self.running[successor] = self.waiting.pop(successor)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data(), n=st.integers(1, 5))
    def charge(self, data: Any, n: int) -> None:
        self.queue.charge(data.draw(st.sampled_from(sorted(self.running))), n)

    @precondition(lambda self: bool(self.running or self.waiting))
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted({**self.running, **self.waiting})))
        self.queue.remove(name)
        self.running.pop(name, None)
        self.waiting.pop(name, None)

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.n_running == len(self.running) <= 3
        assert self.queue.n_waiting == len(self.waiting)
        running, waiting = Counter(self.running.values()), Counter(self.waiting.values())
        for tenant in "abcd":
            assert self.queue.sequence_counts(tenant) == (running[tenant], waiting[tenant])

    def _priority(self, tenant: str) -> int:
        return self.shares.get(tenant, Share()).priority

    def _may_start(self, tenant: str) -> bool:
        limit = self.shares.get(tenant, Share()).max_running
        return limit is None or list(self.running.values()).count(tenant) < limit


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
