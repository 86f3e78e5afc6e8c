"""Which process a model gets a share of."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.plan.sandbox_sharing import (
    MAX_MODELS,
    SharedProcess,
    choose_process,
    n_suitable_processes,
)

MANY = "".join(chr(ord("A") + index) for index in range(MAX_MODELS))


def process(name: str, models: str = "", failed_for: str = "") -> SharedProcess:
    return SharedProcess(name, frozenset(models), frozenset(failed_for))


@pytest.mark.parametrize(
    ("processes", "n_suitable", "chosen"),
    [
        pytest.param([], 1, None, id="none-in-use"),
        pytest.param([process("p", "b")], 2, None, id="fewer-than-suit-the-machine"),
        pytest.param([process("p", "b")], 1, "p", id="as-many-as-suit-the-machine"),
        pytest.param([process("p", "bc"), process("q", "b")], 2, "q", id="fewest-models"),
        pytest.param([process("p", "b"), process("q", "b")], 2, "p", id="oldest-of-equals"),
        pytest.param([process("p", "a"), process("q", "bc")], 2, "q", id="one-share-of-each"),
        pytest.param([process("p", "a"), process("q", "ab")], 2, None, id="a-share-of-all"),
        pytest.param([process("p", "b", "a"), process("q", "bc")], 2, "q", id="none-that-failed"),
        pytest.param([process("p", "b", "a")], 1, None, id="all-failed"),
        pytest.param([process("p", "b", "c")], 1, "p", id="failed-for-another-model"),
        pytest.param([process("p", MANY[1:])], 1, "p", id="one-less-than-most"),
        pytest.param([process("p", MANY)], 1, None, id="as-many-models-as-have-mailboxes"),
    ],
)
def test_chooses_a_process(
    processes: list[SharedProcess], n_suitable: int, chosen: str | None
) -> None:
    assert choose_process(processes, "a", n_suitable=n_suitable) == chosen


@pytest.mark.parametrize(
    ("n_processors", "threads", "expected"), [(2, 1, 2), (8, 3, 2), (2, 4, 1), (1, 1, 1)]
)
def test_processes_have_a_processor_for_each_thread(
    n_processors: int, threads: int, expected: int
) -> None:
    assert n_suitable_processes(n_processors, threads) == expected


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=60),
)
def test_there_are_never_more_processes_than_needed_and_no_model_has_two_shares_of_one(
    n_suitable: int, steps: list[tuple[str, bool]]
) -> None:
    shares: dict[str, set[str]] = {}
    n_created = most_of_a_model = 0
    for model, is_taken in steps:
        if is_taken:
            in_use = [process(name, "".join(models)) for name, models in shares.items()]
            chosen = choose_process(in_use, model, n_suitable=n_suitable)
            if chosen is None:
                n_created += 1
                chosen = f"p{n_created}"
            models = shares.setdefault(chosen, set())
            assert model not in models
            models.add(model)
        else:
            for models in shares.values():
                models.discard(model)
            shares = {name: models for name, models in shares.items() if models}
        of_models = Counter(m for models in shares.values() for m in models)
        most_of_a_model = max(most_of_a_model, *of_models.values(), 0)
        assert len(shares) <= max(n_suitable, most_of_a_model)
