"""Both sides in turn, and the ratios between neighbours in time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.decoding import DecodeRun, equal_token_fraction
from benchmarks.report import Spread
from benchmarks.worker import WorkerProcess

PROMPT_TOKENS = 16  # 32 prompts fill one batch of 512 tokens: one step of prefill


def draw_prompts(batch: int, *, vocabulary: int, seed: int) -> list[list[int]]:
    """Return random prompts."""
    generator = random.Random(f"{batch} {seed}")
    return [[generator.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


@dataclass(frozen=True, slots=True)
class PairedRuns:
    """What both sides gave at one batch size: each pair of runs has the same prompts.

    Attributes:
        in_process: the runs of transformers in one process.
        ours: the runs through functions.
    """

    in_process: tuple[DecodeRun, ...]
    ours: tuple[DecodeRun, ...]

    @property
    def decode_ratio(self) -> Spread:
        """Ours over in-process: time per token."""
        return Spread.from_values([b.step_ms / a.step_ms for a, b in self._run_pairs()])

    @property
    def cpu_ratio(self) -> Spread:
        """Ours over in-process: processor time per token."""
        return Spread.from_values(
            [b.cpu_ms_per_token / a.cpu_ms_per_token for a, b in self._run_pairs()]
        )

    @property
    def calls_per_token(self) -> float:
        """Calls to functions for one token."""
        return median(run.calls_per_token for run in self.ours)

    @property
    def equal_tokens(self) -> float:
        """The part of tokens before the first difference of their request."""
        return median(equal_token_fraction(a.tokens, b.tokens) for a, b in self._run_pairs())

    @property
    def equal_first_tokens(self) -> float:
        """The part of requests whose first token is the same."""
        firsts = [
            x[0] == y[0]
            for a, b in self._run_pairs()
            for x, y in zip(a.tokens, b.tokens, strict=True)
        ]
        return sum(firsts) / len(firsts)

    def _run_pairs(self) -> list[tuple[DecodeRun, DecodeRun]]:
        return list(zip(self.in_process, self.ours, strict=True))


def describe_runs(runs: Sequence[DecodeRun]) -> dict[str, Any]:
    """Return a side's figures at one batch size."""
    return {
        "step_ms": Spread.from_values([run.step_ms for run in runs]),
        "tokens_per_s": Spread.from_values([run.tokens_per_s for run in runs]),
        "cpu_ms_per_token": Spread.from_values([run.cpu_ms_per_token for run in runs]),
        "steps_in_a_turn": runs[0].steps,
    }


async def run_alternating(
    in_process: WorkerProcess,
    ours: WorkerProcess,
    *,
    implementations: Mapping[int, str],
    tokens: Mapping[int, int],
    vocabulary: int,
    rounds: int,
) -> dict[int, PairedRuns]:
    """Let both sides decode in turn; return what they gave by batch size.

    Args:
        in_process: transformers in one process.
        ours: the router.
        implementations: the in-process side's experts implementation by batch size.
        tokens: tokens that each request generates in a turn, by batch size.
        vocabulary: tokens that prompts are drawn from.
        rounds: turns of each side at each batch size.
    """
    runs: dict[int, dict[WorkerProcess, list[DecodeRun]]] = {
        b: {in_process: [], ours: []} for b in tokens
    }
    for number in range(rounds):
        # Who begins changes, so that neither always has the machine as the other left it.
        order = (in_process, ours) if number % 2 == 0 else (ours, in_process)
        for batch, max_tokens in tokens.items():
            prompts = draw_prompts(batch, vocabulary=vocabulary, seed=number)
            for side in order:
                extra = {"implementation": implementations[batch]} if side is in_process else {}
                runs[batch][side].append(
                    await side.run_batch(prompts, max_tokens=max_tokens, **extra)
                )
            a, b = (runs[batch][side][-1].step_ms for side in (in_process, ours))
            print(f"  round {number}, batch {batch}: in-process {a:.1f}, ours {b:.1f} ms a step")
    return {batch: PairedRuns(tuple(r[in_process]), tuple(r[ours])) for batch, r in runs.items()}
