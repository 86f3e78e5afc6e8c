"""What is asked of each server: prompts of token ids, the same for all servers of a round.

All prompts of a run are distinct, so that no server's prompt cache helps it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

OUTPUT_TOKENS = 24
PROMPT_TOKENS = (32, 96)
LONG_PROMPT_TOKENS = (100, 500)
LONG_OUTPUT_TOKENS = 1
CONTEXT_TOKENS = 640
SEQUENTIAL_REQUESTS = 4
SEQUENTIAL_LONG_REQUESTS = 3
CHECK_PROMPTS = 8
CHECK_TOKENS = 8
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are sent with a number of them in flight.

    Attributes:
        concurrency: requests in flight.
        prompts: token ids of each prompt.
        output_tokens: tokens to generate for each, EOS or not.
    """

    concurrency: int
    prompts: tuple[tuple[int, ...], ...]
    output_tokens: int


def spaced_lengths(count: int, bounds: tuple[int, int]) -> list[int]:
    """Return `count` lengths at equal distances, both bounds included; the middle for one."""
    low, high = bounds
    if count == 1:
        return [(low + high) // 2]
    return [low + (high - low) * i // (count - 1) for i in range(count)]


def draw_prompts(
    lengths: Sequence[int], *, vocabulary: int, seed: str
) -> tuple[tuple[int, ...], ...]:
    """Return a prompt of random token ids for each length, in random order."""
    draw = random.Random(seed)
    shuffled = draw.sample(list(lengths), len(lengths))
    return tuple(tuple(draw.randrange(vocabulary) for _ in range(size)) for size in shuffled)


def decode_workload(
    concurrency: int, *, vocabulary: int, round_number: int, is_quick: bool
) -> Workload:
    """Return the workload of tokens/s, TPOT and CPU: one wave of requests, some for batch 1."""
    sequential = SEQUENTIAL_REQUESTS // 2 if is_quick else SEQUENTIAL_REQUESTS
    count = sequential if concurrency == 1 else concurrency
    prompts = draw_prompts(
        spaced_lengths(count, PROMPT_TOKENS),
        vocabulary=vocabulary,
        seed=f"decode {concurrency} {round_number}",
    )
    return Workload(concurrency, prompts, OUTPUT_TOKENS)


def prompt_workload(concurrency: int, *, vocabulary: int, round_number: int) -> Workload:
    """Return the workload of the time to first token."""
    count = SEQUENTIAL_LONG_REQUESTS if concurrency == 1 else concurrency
    prompts = draw_prompts(
        spaced_lengths(count, LONG_PROMPT_TOKENS),
        vocabulary=vocabulary,
        seed=f"prompt {concurrency} {round_number}",
    )
    return Workload(concurrency, prompts, LONG_OUTPUT_TOKENS)


def check_workload(*, vocabulary: int) -> Workload:
    """Return the prompts whose greedy tokens are compared between servers."""
    lengths = spaced_lengths(CHECK_PROMPTS, PROMPT_TOKENS)
    prompts = draw_prompts(lengths, vocabulary=vocabulary, seed="check")
    return Workload(CHECK_PROMPTS, prompts, CHECK_TOKENS)


def warm_up_workload(concurrency: int, *, vocabulary: int, round_number: int) -> Workload:
    """Return short requests that are not measured; the first one is the start's first token."""
    prompts = draw_prompts(
        [PROMPT_TOKENS[0]] * concurrency,
        vocabulary=vocabulary,
        seed=f"warm-up {concurrency} {round_number}",
    )
    return Workload(concurrency, prompts, WARM_UP_TOKENS)
