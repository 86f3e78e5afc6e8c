import random

import pytest
from benchmarks.evaluation.tasks import KINDS, TaskSizes, make_task


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_task_everywhere(kind: str) -> None:
    some, others = (make_task(kind, random.Random(7), TaskSizes()) for _ in range(2))
    assert some == others
    assert some != make_task(kind, random.Random(8), TaskSizes())


def test_kinds_differ_in_length_of_question_and_of_answer() -> None:
    tasks = [make_task(kind, random.Random(0), TaskSizes()) for kind in KINDS]
    lengths = [len(task.prompt) for task in tasks]
    assert max(lengths) > 4 * min(lengths)
    assert len({task.max_tokens for task in tasks}) == len(KINDS)


def test_keeps_the_end_of_a_prompt_that_is_too_long() -> None:
    task = make_task("tracking", random.Random(0), TaskSizes(prompt_characters=40))
    assert len(task.prompt) == 40
    assert task.prompt.endswith("Answer:")


def test_asks_for_a_part_of_the_answer_but_for_two_tokens_at_least() -> None:
    assert make_task("tracking", random.Random(0), TaskSizes(output_fraction=0.5)).max_tokens == 24
    assert (
        make_task("arithmetic", random.Random(0), TaskSizes(output_fraction=0.01)).max_tokens == 2
    )
