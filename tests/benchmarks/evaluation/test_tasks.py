import random

import pytest
from benchmarks.evaluation.tasks import KINDS, TaskSizes, make_task


@pytest.mark.parametrize("kind", KINDS)
def test_seed_determines_task(kind: str) -> None:
    first, second = (make_task(kind, random.Random(7), TaskSizes()) for _ in range(2))
    assert first == second
    assert first != make_task(kind, random.Random(8), TaskSizes())


def test_kinds_differ_in_prompt_and_output_length() -> None:
    tasks = [make_task(kind, random.Random(0), TaskSizes()) for kind in KINDS]
    lengths = [len(task.prompt) for task in tasks]
    assert max(lengths) > 4 * min(lengths)
    assert len({task.max_tokens for task in tasks}) == len(KINDS)


def test_long_prompt_keeps_its_end() -> None:
    task = make_task("tracking", random.Random(0), TaskSizes(prompt_characters=40))
    assert len(task.prompt) == 40
    assert task.prompt.endswith("Answer:")


def test_output_fraction_leaves_at_least_two_tokens() -> None:
    assert make_task("tracking", random.Random(0), TaskSizes(output_fraction=0.5)).max_tokens == 24
    assert (
        make_task("arithmetic", random.Random(0), TaskSizes(output_fraction=0.01)).max_tokens == 2
    )
