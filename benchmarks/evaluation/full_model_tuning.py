"""Tuning of the full model on this machine, with `benchmarks.baseline_tuning`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.alternating_runs import draw_prompts
from benchmarks.baseline_tuning import (
    BATCHED_MM,
    DEFAULT_WAIT_POLICY,
    PASSIVE_WAIT_POLICY,
    running_baseline,
    running_best_baseline,
)
from benchmarks.evaluation.models import BenchmarkModel

TRIAL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class FullModelSettings:
    """Settings of the full model.

    Attributes:
        implementation: returns the experts implementation of transformers for a batch size.
        wait_policy: OMP_WAIT_POLICY of the process.
    """

    implementation: Callable[[int], str]
    wait_policy: str


DEFAULT_SETTINGS = FullModelSettings(lambda _: "grouped_mm", DEFAULT_WAIT_POLICY)
"""The best settings in all trials so far; used without tuning by smoke tests and sweeps."""


async def tune_full_model(model: BenchmarkModel, batches: Sequence[int]) -> FullModelSettings:
    """Return the best settings for the given batch sizes.

    `batched_mm` is excluded: it copies the weights of every token-expert pair, of which the prefill
    of a prompt has hundreds.
    """
    config = json.loads((model.store / "model" / "config.json").read_text(encoding="utf-8"))
    start = partial(running_baseline, model.checkpoint, max_model_len=model.max_model_len)
    prompts = {b: draw_prompts(b, vocabulary=config["vocab_size"], seed=-1) for b in batches}
    print("tuning the full model", flush=True)
    tuning = running_best_baseline(
        start,
        (DEFAULT_WAIT_POLICY, PASSIVE_WAIT_POLICY),
        prompts,
        max_tokens=TRIAL_TOKENS,
        fits=lambda implementation, _: implementation != BATCHED_MM,
    )
    async with tuning as (_, best):
        return FullModelSettings(best.implementations.__getitem__, best.wait_policy)
