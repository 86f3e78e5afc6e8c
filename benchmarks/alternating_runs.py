"""Alternating runs of the baseline and of FaaSMoE, compared pair by pair.

Pairing neighbouring runs cancels slow drift of the machine (frequency, other load).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.decoding import DecodeRun, equal_token_fraction
from benchmarks.report import Spread
from benchmarks.worker import WorkerProcess

PROMPT_TOKENS = 16  # 32 prompts fill one batch of 512 tokens, so prefill takes one step


def draw_prompts(batch: int, *, vocabulary: int, seed: int) -> list[list[int]]:
    """Return `batch` random prompts of PROMPT_TOKENS token ids."""
    generator = random.Random(f"{batch} {seed}")
    return [[generator.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


@dataclass(frozen=True, slots=True)
class PairedRuns:
    """Runs of both systems at one batch size; runs at the same index have the same prompts.

    Attributes:
        in_process: runs of transformers in one process.
        ours: runs through expert functions.
    """

    in_process: tuple[DecodeRun, ...]
    ours: tuple[DecodeRun, ...]

    @property
    def decode_ratio(self) -> Spread:
        """Time per token, ours divided by in-process."""
        return Spread.from_values([b.step_ms / a.step_ms for a, b in self._run_pairs()])

    @property
    def cpu_ratio(self) -> Spread:
        """CPU time per token, ours divided by in-process."""
        return Spread.from_values(
            [b.cpu_ms_per_token / a.cpu_ms_per_token for a, b in self._run_pairs()]
        )

    @property
    def calls_per_token(self) -> float:
        """Median number of function calls per generated token."""
        return median(run.calls_per_token for run in self.ours)

    @property
    def equal_tokens(self) -> float:
        """Median fraction of tokens that precede their request's first difference."""
        return median(equal_token_fraction(a.tokens, b.tokens) for a, b in self._run_pairs())

    @property
    def equal_first_tokens(self) -> float:
        """Fraction of requests whose first token is equal."""
        is_equal = [
            x[0] == y[0]
            for a, b in self._run_pairs()
            for x, y in zip(a.tokens, b.tokens, strict=True)
        ]
        return sum(is_equal) / len(is_equal)

    def _run_pairs(self) -> list[tuple[DecodeRun, DecodeRun]]:
        return list(zip(self.in_process, self.ours, strict=True))


def describe_runs(runs: Sequence[DecodeRun]) -> dict[str, Any]:
    """Return the JSON figures of one system at one batch size."""
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
    """Run the baseline and FaaSMoE alternately.

    Args:
        in_process: worker with transformers in one process.
        ours: worker with the router.
        implementations: the baseline's experts implementation by batch size.
        tokens: tokens to generate per request, by batch size.
        vocabulary: prompts contain token ids below this number.
        rounds: runs of each system at each batch size.

    Returns:
        The paired runs by batch size.
    """
    runs: dict[int, dict[WorkerProcess, list[DecodeRun]]] = {
        b: {in_process: [], ours: []} for b in tokens
    }
    for number in range(rounds):
        # Alternate the order, so that neither system always runs on caches left by the other.
        order = (in_process, ours) if number % 2 == 0 else (ours, in_process)
        for batch, max_tokens in tokens.items():
            prompts = draw_prompts(batch, vocabulary=vocabulary, seed=number)
            for worker in order:
                is_baseline = worker is in_process
                extra = {"implementation": implementations[batch]} if is_baseline else {}
                runs[batch][worker].append(
                    await worker.run_batch(prompts, max_tokens=max_tokens, **extra)
                )
            a, b = (runs[batch][worker][-1].step_ms for worker in (in_process, ours))
            print(f"  round {number}, batch {batch}: in-process {a:.1f}, ours {b:.1f} ms a step")
    return {batch: PairedRuns(tuple(r[in_process]), tuple(r[ours])) for batch, r in runs.items()}
