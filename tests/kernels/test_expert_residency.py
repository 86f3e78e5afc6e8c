"""What stays in memory that cannot hold all experts: the policy; times and misses are arguments."""

from collections.abc import Sequence

import pytest

from faasmoe_kernels import KernelLibrary
from faasmoe_kernels.expert_residency import ExpertResidency, ExpertUse, ResidencyPlan

SIZE_BYTES = 8 << 20
STEP_S = 0.01


class Memory:
    """Memory for some experts, whose kernel evicts what was used least recently."""

    def __init__(self, library: KernelLibrary, capacity: int) -> None:
        self.residency = ExpertResidency(library)
        self.capacity = capacity
        self.resident: dict[int, None] = {}
        self.now_s = 100.0
        self.n_read = 0

    def call(self, experts: Sequence[int], *, layer: int = 0) -> ResidencyPlan:
        """Compute experts as limited_memory.cpp does."""
        self.now_s += STEP_S
        plan = self.residency.begin(self.now_s, [ExpertUse(e, layer, SIZE_BYTES) for e in experts])
        self.drop(plan.evicted)
        n_missed = sum(e not in self.resident for e in experts if e not in plan.read)
        for expert in experts:
            self.n_read += expert not in self.resident
            self.drop([expert])
            self.resident[expert] = None
            while len(self.resident) > self.capacity:
                del self.resident[next(iter(self.resident))]
            self.drop([expert] if expert in plan.dropped else [])
        self.drop(self.residency.finish(self.now_s, n_missed * SIZE_BYTES))
        return plan

    def drop(self, experts: Sequence[int]) -> None:
        """Drop experts from memory."""
        for expert in experts:
            self.resident.pop(expert, None)


def test_everything_stays_while_all_fits(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=8)
    plans = [memory.call(range(8)) for _ in range(50)]
    assert plans[0].read == tuple(range(8))
    assert all(plan == ResidencyPlan((), (), ()) for plan in plans[1:])
    assert memory.residency.capacity_bytes is None
    assert memory.residency.kept_bytes == 8 * SIZE_BYTES


def test_what_is_used_often_stays_where_a_scan_uses_everything(
    default_library: KernelLibrary,
) -> None:
    memory = Memory(default_library, capacity=10)
    for number in range(400):
        memory.call([0, 1, 2, 3])
        if number % 8 == 0:  # a prompt
            memory.call(range(20))
    memory.n_read = 0
    for number in range(80):
        memory.call([0, 1, 2, 3])
        if number % 8 == 0:
            memory.call(range(20))
    n_scans = 10
    assert memory.n_read < n_scans * 15, "least recently used evicts all at each scan: 24 reads"
    assert {0, 1, 2, 3} <= memory.resident.keys()


def test_what_is_used_rarely_is_dropped_once_it_is_computed(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=4)
    for number in range(200):
        memory.call([0, 1, 2, 3] if number % 4 else range(8))
    assert memory.call([0, 9]) == ResidencyPlan(read=(9,), dropped=(9,), evicted=())


def test_what_becomes_popular_takes_the_place_of_what_was(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=3)
    for _ in range(100):
        memory.call([0, 1, 2, 3])
    for _ in range(300):
        memory.call([4, 5])
    assert {4, 5} <= memory.resident.keys()
    memory.n_read = 0
    for _ in range(20):
        memory.call([4, 5])
    assert memory.n_read == 0


def test_more_stays_when_there_is_more_memory_again(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=5)
    for _ in range(100):
        memory.call(range(10))
    limited = memory.residency.capacity_bytes
    assert limited is not None
    assert limited < 6 * SIZE_BYTES
    memory.capacity = 10
    for _ in range(100):  # two minutes
        memory.now_s += 1.2
        memory.call(range(10))
    assert memory.residency.capacity_bytes is None
    assert memory.call(range(10)) == ResidencyPlan((), (), ())


def test_what_was_idle_may_be_gone_without_a_lack_of_memory(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=10)
    memory.call(range(10))
    memory.resident.clear()
    memory.now_s += 30
    plan = memory.call(range(10))
    assert plan.read == tuple(range(10))
    assert memory.residency.capacity_bytes is None


def test_a_detached_function_is_forgotten(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=10)
    memory.call(range(5))
    memory.now_s += 90
    memory.call([7])
    assert memory.residency.kept_bytes == SIZE_BYTES


def test_layers_are_compared_by_their_own_calls(default_library: KernelLibrary) -> None:
    memory = Memory(default_library, capacity=3)
    for _ in range(200):  # of layer 1 a third of the calls: what all of them use is as important
        memory.call([0, 1], layer=0)
        memory.call([0], layer=0)
        memory.call([10, 11], layer=1)
    assert {0, 10} <= memory.resident.keys()


@pytest.mark.parametrize("missed_bytes", [0, 200 << 10])
def test_a_few_missing_pages_are_no_lack_of_memory(
    default_library: KernelLibrary, missed_bytes: int
) -> None:
    residency = ExpertResidency(default_library)
    uses = [ExpertUse(e, 0, SIZE_BYTES) for e in range(4)]
    for number in range(10):
        residency.begin(100.0 + number, uses)
        assert residency.finish(100.0 + number, missed_bytes) == ()
    assert residency.capacity_bytes is None
