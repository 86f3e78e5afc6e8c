"""Synthetic prompts of five kinds of task in the style of BIG-Bench.

They are generated, so that no licensed text is needed. The kinds differ in the lengths of prompt
and output. All randomness comes from the generator that the caller passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
THINGS = ("apple", "boat", "candle", "drum", "egg", "flute", "glove", "hammer", "kite", "lamp")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
MONTHS = ("January", "March", "May", "July", "August", "October", "December")  # of 31 days


@dataclass(frozen=True, slots=True)
class Task:
    """A task.

    Attributes:
        kind: a key of KINDS.
        prompt: the prompt.
        max_tokens: number of tokens to generate.
    """

    kind: str
    prompt: str
    max_tokens: int


def arithmetic(draw: random.Random) -> str:
    """Return an arithmetic question."""
    a, b, c = (draw.randrange(2, 100) for _ in range(3))
    return f"Question: What is {a} plus {b} times {c}?\nAnswer:"


def sorting(draw: random.Random) -> str:
    """Return a list of words to sort."""
    words = draw.sample(THINGS + COLOURS, 8)
    return f"Sort these words by the alphabet: {' '.join(words)}\nSorted:"


def dates(draw: random.Random) -> str:
    """Return a question about dates."""
    month, day, later = draw.choice(MONTHS), draw.randrange(1, 20), draw.randrange(2, 11)
    return (
        f"Today is the {day}th of {month}. {draw.choice(NAMES)} will come in {later} days, and "
        f"stay for a week. On which day is the visit over? Think step by step.\nAnswer:"
    )


def counting(draw: random.Random) -> str:
    """Return a counting question."""
    counts = [f"{draw.randrange(2, 9)} {draw.choice(COLOURS)} {x}s" for x in draw.sample(THINGS, 4)]
    return (
        f"{draw.choice(NAMES)} has {', '.join(counts[:-1])} and {counts[-1]}. "
        f"Two of the {counts[0][2:]} are given away. "
        "How many things are left, and which ones are there most of?\nAnswer:"
    )


def tracking(draw: random.Random) -> str:
    """Return a question about objects that people swap."""
    people, things = draw.sample(NAMES, 4), draw.sample(THINGS, 4)
    possessions = ", ".join(f"{p} has the {t}" for p, t in zip(people, things, strict=True))
    swaps = [draw.sample(people, 2) for _ in range(4)]
    swap_text = ". Then ".join(f"{a} and {b} swap what they hold" for a, b in swaps)
    return (
        f"Four friends play a game. At first, {possessions}. Then {swap_text}. "
        f"Who has the {draw.choice(things)} at the end? Explain every step.\nAnswer:"
    )


KINDS: Mapping[str, tuple[Callable[[random.Random], str], int]] = {
    "arithmetic": (arithmetic, 16),
    "sorting": (sorting, 24),
    "dates": (dates, 32),
    "counting": (counting, 40),
    "tracking": (tracking, 48),
}
"""Prompt generator and number of output tokens by kind."""


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """Limits on the length of tasks.

    Attributes:
        prompt_characters: maximum length of a prompt; a longer one keeps its end.
        output_fraction: fraction of a kind's output tokens to generate.
    """

    prompt_characters: int = 1000
    output_fraction: float = 1.0


def make_task(kind: str, draw: random.Random, sizes: TaskSizes) -> Task:
    """Generate a task of the given kind."""
    generate, tokens = KINDS[kind]
    prompt = generate(draw)[-sizes.prompt_characters :]
    return Task(kind, prompt, max(2, round(tokens * sizes.output_fraction)))
