"""Prompts of five kinds of task, as BIG-Bench has them, made up here so that nobody's text is used.

The kinds differ in length of question and of answer. Everything follows from the random generator
that is passed in.
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
    """A question.

    Attributes:
        kind: which of the kinds it is of.
        prompt: its text.
        max_tokens: tokens that an answer may have.
    """

    kind: str
    prompt: str
    max_tokens: int


def arithmetic(draw: random.Random) -> str:
    """Return a sum to be found."""
    a, b, c = (draw.randrange(2, 100) for _ in range(3))
    return f"Question: What is {a} plus {b} times {c}?\nAnswer:"


def sorting(draw: random.Random) -> str:
    """Return words to be sorted."""
    words = draw.sample(THINGS + COLOURS, 8)
    return f"Sort these words by the alphabet: {' '.join(words)}\nSorted:"


def dates(draw: random.Random) -> str:
    """Return a day to be named."""
    month, day, later = draw.choice(MONTHS), draw.randrange(1, 20), draw.randrange(2, 11)
    return (
        f"Today is the {day}th of {month}. {draw.choice(NAMES)} will come in {later} days, and "
        f"stay for a week. On which day is the visit over? Think step by step.\nAnswer:"
    )


def counting(draw: random.Random) -> str:
    """Return things to be counted."""
    counts = [f"{draw.randrange(2, 9)} {draw.choice(COLOURS)} {x}s" for x in draw.sample(THINGS, 4)]
    return (
        f"{draw.choice(NAMES)} has {', '.join(counts[:-1])} and {counts[-1]}. Two of the {counts[0][2:]} "
        "are given away. How many things are left, and which ones are there most of?\nAnswer:"
    )


def tracking(draw: random.Random) -> str:
    """Return things that change hands."""
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
"""What makes a prompt of each kind, and the tokens of its answer."""


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """How long tasks may be.

    Attributes:
        prompt_characters: of a prompt; of a longer one the end is kept.
        output_part: what part of a kind's answer is asked for.
    """

    prompt_characters: int = 1000
    output_fraction: float = 1.0


def make_task(kind: str, draw: random.Random, sizes: TaskSizes) -> Task:
    """Return a task of a kind."""
    generate, tokens = KINDS[kind]
    prompt = generate(draw)[-sizes.prompt_characters :]
    return Task(kind, prompt, max(2, round(tokens * sizes.output_fraction)))
